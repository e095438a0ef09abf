"""Group a model's tensors by layer, for tables over depth."""

from __future__ import annotations

from collections.abc import Iterable

from ..architecture import Structure, TensorRole
from ..architecture.names import first_index
from ..checkpoint import Checkpoint

_ORDER = {"pre": 0, "layer": 1, "loose": 2, "post": 3}


def structure_of(checkpoint: Checkpoint) -> Structure:
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return Structure.of(shapes, checkpoint.config)


def by_layer(structure: Structure, names: Iterable[str]) -> dict[str, str]:
    """Tensor -> its layer, in order of depth.

    A layer is its number ("7"; with several stacks "encoder.block.7"); what lies outside is grouped by role.
    Without a config.json to count the layers, numbered blocks stand for them.
    """
    several = len(structure.stacks) > 1
    ordered = sorted((structure[name] for name in names), key=_place)
    return {tensor.name: _label(tensor, several) for tensor in ordered}


def _place(tensor: TensorRole) -> tuple[int, str, int, str]:
    container, index = _block(tensor)
    place = len(_ORDER) if tensor.kind == "post" and tensor.role.startswith("head") else _ORDER[tensor.kind]
    return place, container, index, tensor.name


def _block(tensor: TensorRole) -> tuple[str, int]:
    """The stack and layer, or what looks like it in a model whose layers nobody counts."""
    if tensor.stack is not None and tensor.layer is not None:
        return tensor.stack, tensor.layer
    cut = first_index(tensor.name) if tensor.kind == "loose" else None
    return (cut.container, cut.number) if cut else (tensor.role, -1)


def _label(tensor: TensorRole, several: bool) -> str:
    container, index = _block(tensor)
    if index < 0:
        return container
    return str(index) if tensor.kind == "layer" and not several else f"{container}.{index}"

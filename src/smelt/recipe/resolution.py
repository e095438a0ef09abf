"""Which value of a parameter holds for a tensor: nearest level first.

source (or model) > slice > module > top level of the recipe; after these comes the method's default.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .language import InputModel, OutputModule, OutputSlice, Recipe
from .settings import Setting

Level = Mapping[str, Setting]


def levels(
    recipe: Recipe,
    *,
    source: InputModel | None = None,
    piece: OutputSlice | None = None,
    module: OutputModule | None = None,
) -> tuple[Level, ...]:
    """The parameter sections to ask, nearest first. Leave ``source`` out for a shared parameter."""
    holders = (source, piece, module, recipe)
    return tuple(holder.parameters for holder in holders if holder is not None)


def resolve_parameter(
    name: str, asked: Iterable[Level], *, tensor_name: str, t: float
) -> bool | int | float | str | None:
    """The value from the first of the levels ``asked`` that yields one for this tensor, or None.

    tensor_name: the source tensor's name for a per-model parameter, the output's for a shared one.
    """
    for level in asked:
        value = level[name].resolve(t, tensor_name) if name in level else None
        if value is not None:
            return value
    return None


def depth_in_slice(layer: int | None, layers: int) -> float:
    """The ``t`` of the layer with this index within a slice of ``layers``.

    1 for a slice of one layer, 0 for tensors outside the layers (``layer`` None).
    """
    if layer is None:
        return 0.0
    return layer / (layers - 1) if layers > 1 else 1.0

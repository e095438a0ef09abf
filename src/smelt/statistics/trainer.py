"""A plain optimizer state of torch, as Hugging Face's Trainer saves it (optimizer.pt).

Parameters are numbered, group by group: first those with weight decay, then those without, each in the order
in which the model registers them. No rule for what decays is trusted: of the rules in use, those count whose
shapes agree with the file's, and they must agree with each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import storage
from ..checkpoint.torch_file import StoredTensor, TorchFile
from ..errors import InputRejected
from .assembled import Stretch
from .deepspeed import Placed
from .order import DECAY_RULES, registered

Shapes = Mapping[str, tuple[int, ...]]


def read_torch(
    path: Path, shapes: Shapes, files: list[TorchFile], kind: str, order: Sequence[str] | None
) -> tuple[Placed, Mapping[str, Any]]:
    """Where each parameter's ``kind`` lies, and the options of its first group."""
    files.append(TorchFile(path))
    content = files[-1].content
    if not isinstance(content, Mapping) or not {"state", "param_groups"} <= content.keys():
        raise InputRejected(f"{storage.shown(path)} holds no optimizer state: expected state and param_groups")
    state, groups = content["state"], content["param_groups"]
    names = _named(path, groups, state, shapes, kind, order)
    moments = {name: state[key][kind] for key, name in names.items() if key in state and kind in state[key]}
    return {name: (tensor.shape, _all_of(tensor)) for name, tensor in moments.items()}, groups[0]


def _all_of(tensor: StoredTensor) -> list[Stretch]:
    return [Stretch(tensor, 0, tensor.count)]


def _named(
    path: Path, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any], shapes: Shapes, kind: str,
    order: Sequence[str] | None,
) -> dict[Any, str]:  # fmt: skip
    """Key in the file -> name in the model."""
    keys = [list(group["params"]) for group in groups]
    if all("param_names" in group for group in groups):
        return _paired(keys, [list(group["param_names"]) for group in groups])
    if all(isinstance(key, str) for many in keys for key in many):
        return {key: key for many in keys for key in many}
    candidates = _candidates(keys, list(order) if order is not None else registered(shapes), shapes)
    fitting = [names for names in candidates if _agree(names, state, shapes, kind)]
    if not fitting:
        counts = " + ".join(str(len(many)) for many in keys)
        raise InputRejected(
            f"{storage.shown(path)}: the shapes of its {counts} parameters do not fit the model's {len(shapes)} in any "
            "order known here: give the names of the trained parameters in their order (order=)"
        )
    if any(names != fitting[0] for names in fitting[1:]):
        raise InputRejected(f"{storage.shown(path)}: several orders of the parameters fit: it must name them itself")
    return fitting[0]


def _candidates(keys: list[list[Any]], names: list[str], shapes: Shapes) -> list[dict[Any, str]]:
    """Every way to name the parameters of the file that has the right numbers of them."""
    splits = [[names]]
    for rule in DECAY_RULES:
        kept = [name for name in names if rule(name, shapes.get(name, ()))]
        splits.append([kept, [name for name in names if name not in set(kept)]])
    fitting = [split for split in splits if [len(part) for part in split] == [len(many) for many in keys]]
    return [_paired(keys, split) for split in fitting]


def _paired(keys: list[list[Any]], names: list[list[str]]) -> dict[Any, str]:
    pairs = (zip(many, named, strict=True) for many, named in zip(keys, names, strict=True))
    return {key: name for group in pairs for key, name in group}


def _agree(names: Mapping[Any, str], state: Mapping[Any, Any], shapes: Shapes, kind: str) -> bool:
    """Whether all shapes of the file are the model's."""
    return all(
        name in shapes and (key not in state or kind not in state[key] or state[key][kind].shape == shapes[name])
        for key, name in names.items()
    )

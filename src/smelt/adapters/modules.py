"""The modules of a model as PEFT sees them, from the names and shapes of its tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..architecture import role_of
from ..checkpoint import Checkpoint
from ..checkpoint.adapter import is_transposed_layer
from ..kernels.dtypes import DTYPES

Kind = Literal["linear", "embedding", "convolution", "other"]


@dataclass(frozen=True)
class Module:
    """One module: ``tensors`` maps a parameter's own name ("weight") to the tensor's.

    ``leaf``: no other module lies in it, so that it can be stored whole. ``transposed``: a linear layer stored
    as (in, out). ``head``: it gives the logits.
    """

    name: str
    kind: Kind
    tensors: Mapping[str, str]
    leaf: bool = True
    transposed: bool = False
    head: bool = False

    @property
    def last(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]


def modules_of(checkpoint: Checkpoint) -> list[Module]:
    """All modules that hold floating tensors, sorted by name."""
    tensors: dict[str, dict[str, str]] = defaultdict(dict)
    for name, info in checkpoint.tensors.items():
        if DTYPES[info.dtype].arithmetic:
            module, _, parameter = name.rpartition(".")
            tensors[module][parameter] = name
    return [_module(name, tensors[name], checkpoint, set(tensors)) for name in sorted(tensors)]


def _module(name: str, tensors: Mapping[str, str], checkpoint: Checkpoint, names: set[str]) -> Module:
    kind = _kind(tensors, checkpoint)
    leaf = bool(name) and not any(other.startswith(name + ".") for other in names)
    swapped = bool(is_transposed_layer(name, checkpoint.config))
    head = "weight" in tensors and role_of(tensors["weight"]) == "head"
    return Module(name, kind, tensors, leaf, kind == "linear" and swapped, head)


def _kind(tensors: Mapping[str, str], checkpoint: Checkpoint) -> Kind:
    """By the shape of its weight; what has more parameters than weight and bias is none of them."""
    if not {"weight"} <= tensors.keys() <= {"weight", "bias"}:
        return "other"
    shape = checkpoint.tensors[tensors["weight"]].shape
    if len(shape) == 2:
        return "embedding" if role_of(tensors["weight"]) in ("embedding", "position") else "linear"
    # One input channel per filter: a grouped convolution, which PEFT cannot decompose.
    return "convolution" if 3 <= len(shape) <= 5 and shape[1] > 1 else "other"

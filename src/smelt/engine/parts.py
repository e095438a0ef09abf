"""Results in parts: how they are stored, and one task's model put together again.

A result in parts holds for each merged tensor ``unified/<tensor>``, and for each task ``mask.<task>/<tensor>``
(uint8: eight elements to a byte, the first in the most significant bit, padded at the end) and, where the
method rescales, ``rescale.<task>/<tensor>`` (float32, one number); or for each task ``factors.<task>/<tensor>``
(a row per singular triplet) or ``delta.<task>/<tensor>``. Tensors that are not merged are ``own.<task>/<tensor>``,
whole. See :mod:`smelt.methods.parts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..kernels.program import Bits, Copy, Number, Operand, Output, Whole
from ..methods import Method, Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """One stored tensor of a result in parts."""

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    output: Output


def parts_of(method: Method, tensor: Tensor, dtype: str) -> list[Part]:
    """What the method makes of one tensor; vectors are stored as ``dtype``."""
    assert method.parts is not None
    return [
        Part(kind, f"{kind}/{tensor.name}", *_stored(output, dtype, tensor), output)
        for kind, output in method.parts(tensor).items()
    ]


def own_parts(name: str, models: Sequence[Operand], dtype: str) -> list[Part]:
    """A tensor that each task keeps as it is."""
    return [Part("own", f"own.{task}/{name}", dtype, model.shape, Copy(model)) for task, model in enumerate(models)]


def _stored(output: Output, dtype: str, tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    if isinstance(output, Bits):
        return "U8", (-(-tensor.count // 8),)
    if isinstance(output, Whole) and output.shape is not None:
        return dtype, output.shape
    return ("F32", ()) if isinstance(output, Number) else (dtype, tensor.shape)

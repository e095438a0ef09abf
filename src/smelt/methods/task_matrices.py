"""What the methods that take task matrices apart share: their parameters, and what becomes of all other tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import ceil, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.program import Call, Source, call
from .registry import Parameter
from .spectral import Matrix, Strips
from .task_arithmetic import add_task_vectors
from .tensors import Tensor


def delta_of(base: npt.NDArray[Any], model: npt.NDArray[Any]) -> Matrix:
    """model - base without rounding."""
    return np.asarray(model, np.float64) - np.asarray(base, np.float64)


#: Elements of a strip.
STRIP = 1 << 19


def spans(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """The rows, first and last, that strips of a matrix have; a wide one is one strip."""
    rows, columns = shape
    step = rows if rows < columns else max(1, STRIP // max(1, columns))
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def task_strips(base: Source, model: Source) -> Strips:
    """model - base as a tall matrix: the transpose where it is wide, which is held whole then."""
    rows, columns = base.shape

    def parts() -> Iterator[Matrix]:
        for first, last in spans(base.shape):
            change = model.rows(first, last).astype(np.float64)
            change -= base.rows(first, last)
            yield change.T if rows < columns else change

    return Strips((max(rows, columns), min(rows, columns)), parts)


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor has two axes and is not named by ``average``."""
    return len(tensor.shape) == 2 and not any(re.match(pattern, tensor.name) for pattern in tensor["average"])


def averaged(tensor: Tensor) -> Call:
    """The mean of the (weighted) deltas, times alpha, on the base."""
    weights = tensor.each.get("weight", (1.0,) * tensor.size)
    scale = tensor["alpha"] / tensor.size
    return call(add_task_vectors, base=tensor.base, models=tensor.models, weights=weights, scale=scale)


def held(tensor: Tensor, each: float, squares: float, side: int | None = None) -> tuple[int, int]:
    """``Method.holds`` of a matrix at its peak, as measured: bytes per element, and fp64 square matrices.

    ``each`` counts the operands (fp32) and all else that is as large as the tensor; ``squares`` Gram matrices,
    eigenvectors and what LAPACK takes (three for an eigenproblem), of the length ``side``, by default the short one's.
    """
    length = min(tensor.shape) if side is None else side
    return tensor.count, ceil(each + 8 * squares * length * length / max(1, tensor.count))


def held_in_strips(tensor: Tensor, strips: float, squares: float, side: int | None = None) -> int:
    """Bytes that a function of sources holds in fp64 strips and square matrices, and what each source keeps.

    A strip of a wide matrix is all of it.
    """
    rows, columns = tensor.shape[0], prod(tensor.shape[1:])
    strip = tensor.count if rows < columns else min(tensor.count, STRIP)
    length = min(rows, columns) if side is None else side
    return int(8 * (strips * strip + squares * length * length)) + of_sources(tensor)


def of_sources(tensor: Tensor) -> int:
    """Bytes that the sources of all models and the base keep: a tile of each."""
    return 4 * (tensor.size + 1) * min(tensor.count, STRIP)


def in_many_strips(tensor: Tensor) -> bool:
    """Whether there is a strip before the one in work, which is still held."""
    return tensor.count > STRIP and tensor.shape[0] >= prod(tensor.shape[1:])


def at_most(tensor: Tensor, *phases: int) -> tuple[int, int]:
    """``Method.holds`` from the bytes that are held in turn."""
    return tensor.count, ceil(max(phases) / max(1, tensor.count))


ALPHA = Parameter("alpha", "float", 1.0, "factor of the merged task vector: 0.3 to 3", mergekit=False)
AVERAGE = Parameter(
    "average", "strings", (".*text_projection",),
    "regular expressions, anchored at the start: such matrices are averaged", mergekit=False,
)  # fmt: skip
TOLERANCE = Parameter(
    "tolerance", "float", 0.0,
    "singular values up to this share of the largest count as zero; for merged LoRA adapters 0.001",
    low=0, high=1, mergekit=False,
)  # fmt: skip

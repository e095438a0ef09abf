"""What the methods that take task matrices apart share: their parameters, and what becomes of all other tensors."""

from __future__ import annotations

import re
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.program import Call, call
from .registry import Parameter
from .spectral import Matrix
from .task_arithmetic import add_task_vectors
from .tensors import Tensor


def delta_of(base: npt.NDArray[Any], model: npt.NDArray[Any]) -> Matrix:
    """model - base without rounding."""
    return np.asarray(model, np.float64) - np.asarray(base, np.float64)


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

"""Add a product of two thin matrices to a run of elements, in fp32, with the same bits whatever the run.

Each element is the sum of its products in the order of the inner index, then times the scale, then added to what
is there: it depends on nothing but its own row and column. BLAS promises no such order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .generate import Generated
from .native import Kernel, load

_HEAD = """import numpy as np
from numba import njit
from numpy import float32
from smelt.kernels.scalars import FAST"""

#: Columns of a stretch: four of its rows and the sums stay in the fastest cache.
_WIDTH = 1024

#: The inner index goes four at a time, so that a sum is loaded and stored once for four products of it. Adding
#: them one after the other keeps the order.
_PARTS = '''
@njit(**FAST)
def four(sums, b0, b1, b2, b3, a0, a1, a2, a3):
    for j in range(sums.shape[0]):
        sums[j] = (((sums[j] + b0 * a0[j]) + b1 * a1[j]) + b2 * a2[j]) + b3 * a3[j]

@njit(**FAST)
def one(sums, b, a):
    for j in range(sums.shape[0]):
        sums[j] = sums[j] + b * a[j]

@njit(**FAST)
def stretch(sums, left, right, rank, width, row, column):
    """The products of one row with ``sums.shape[0]`` columns."""
    n = sums.shape[0]
    sums[:] = float32(0)
    whole = rank - rank % 4
    for k in range(0, whole, 4):
        b, a = left[row * rank + k : row * rank + k + 4], k * width + column
        four(sums, b[0], b[1], b[2], b[3], right[a : a + n], right[a + width : a + width + n],
             right[a + 2 * width : a + 2 * width + n], right[a + 3 * width : a + 3 * width + n])
    for k in range(whole, rank):
        one(sums, left[row * rank + k], right[k * width + column : k * width + column + n])

@njit(**FAST)
def add(out, sums, scale):
    for j in range(out.shape[0]):
        out[j] = out[j] + scale * sums[j]

@njit(**FAST)
def run(start, rank, width, scale, left, right, out, space, result):
    end = start + out.shape[0]
    for first in range(0, width, 1024):
        for row in range(start // width, (end + width - 1) // width):
            low = max(row * width + first, start)
            high = min(row * width + min(first + 1024, width), end)
            if low < high:
                sums = space[: high - low]
                stretch(sums, left, right, rank, width, row, low - row * width)
                add(out[low - start : high - start], sums, scale)
'''


@cache
def _kernel() -> Kernel:
    parameters = (
        ("start", "int64"), ("rank", "int64"), ("width", "int64"), ("scale", "float32"), ("left", "[float32]"),
        ("right", "[float32]"), ("out", "[float32]"),
    )  # fmt: skip
    return load(Generated(f"{_HEAD}\n{_PARTS}", parameters, (("space", "float32", _WIDTH),)))


def add_product(
    left: npt.NDArray[Any], right: npt.NDArray[Any], scale: float, start: int, out: npt.NDArray[Any]
) -> None:
    """``out += scale * (left @ right)``, of whose elements in C order ``out`` holds start .. start + len(out).

    left: (rows, r), right: (r, columns), out: one-dimensional; all float32 and contiguous. Thread-safe.
    """
    rank, width = right.shape
    if left.shape[1] != rank or start < 0 or start + len(out) > left.shape[0] * width:
        raise ValueError(f"elements {start} to {start + len(out)} of {left.shape} times {right.shape}")
    if rank and len(out):
        _kernel()(start, rank, width, np.float32(scale), left.reshape(-1), right.reshape(-1), out)

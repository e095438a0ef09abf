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

#: Columns of a stretch times the rank: so much of ``right``, brought together, stays in the core's own cache while
#: all rows pass. (Where it lies, rows are often whole pages apart, and would drive each other out.)
_KEPT = 1 << 14

#: The longest and shortest stretch.
_WIDTH, _LEAST = 1024, 128

#: The inner index goes four at a time and rows go two at a time, so that what is loaded once serves four products of a
#: sum, and two sums. Adding products one after the other keeps the order.
_PARTS = '''
@njit(**FAST)
def four(sums, b0, b1, b2, b3, a0, a1, a2, a3):
    for j in range(sums.shape[0]):
        sums[j] = (((sums[j] + b0 * a0[j]) + b1 * a1[j]) + b2 * a2[j]) + b3 * a3[j]

@njit(**FAST)
def four_twice(sums, more, b0, b1, b2, b3, c0, c1, c2, c3, a0, a1, a2, a3):
    for j in range(sums.shape[0]):
        sums[j] = (((sums[j] + b0 * a0[j]) + b1 * a1[j]) + b2 * a2[j]) + b3 * a3[j]
        more[j] = (((more[j] + c0 * a0[j]) + c1 * a1[j]) + c2 * a2[j]) + c3 * a3[j]

@njit(**FAST)
def one(sums, b, a):
    for j in range(sums.shape[0]):
        sums[j] = sums[j] + b * a[j]

@njit(**FAST)
def rest(sums, left, kept, rank, size, row, column):
    """The last products of one row: fewer than four."""
    for k in range(rank - rank % 4, rank):
        one(sums, left[row * rank + k], kept[k * size + column : k * size + column + sums.shape[0]])

@njit(**FAST)
def stretch(sums, left, kept, rank, size, row, column):
    """The products of one row with ``sums.shape[0]`` columns."""
    n = sums.shape[0]
    sums[:] = float32(0)
    for k in range(0, rank - rank % 4, 4):
        b, a = left[row * rank + k : row * rank + k + 4], k * size + column
        four(sums, b[0], b[1], b[2], b[3], kept[a : a + n], kept[a + size : a + size + n],
             kept[a + 2 * size : a + 2 * size + n], kept[a + 3 * size : a + 3 * size + n])
    rest(sums, left, kept, rank, size, row, column)

@njit(**FAST)
def stretches(sums, more, left, kept, rank, size, row):
    """The same for two rows and all columns."""
    n = sums.shape[0]
    sums[:] = float32(0)
    more[:] = float32(0)
    for k in range(0, rank - rank % 4, 4):
        b, c = left[row * rank + k : row * rank + k + 4], left[(row + 1) * rank + k : (row + 1) * rank + k + 4]
        a = k * size
        four_twice(sums, more, b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3],
                   kept[a : a + n], kept[a + size : a + size + n],
                   kept[a + 2 * size : a + 2 * size + n], kept[a + 3 * size : a + 3 * size + n])
    rest(sums, left, kept, rank, size, row, 0)
    rest(more, left, kept, rank, size, row + 1, 0)

@njit(**FAST)
def add(out, sums, scale):
    for j in range(out.shape[0]):
        out[j] = out[j] + scale * sums[j]

@njit(**FAST)
def keep(kept, right, rank, width, first, size):
    """Bring together ``size`` columns."""
    for k in range(rank):
        some, stored = kept[k * size : (k + 1) * size], right[k * width + first : k * width + first + size]
        for j in range(size):
            some[j] = stored[j]

@njit(**FAST)
def rows(start, rank, width, scale, first, last, left, kept, out, space, other):
    """The columns first .. last of all rows."""
    end, size, row = start + out.shape[0], last - first, start // width
    while row * width + first < end:
        low, high = max(row * width + first, start), min(row * width + last, end)
        sums, more = space[: high - low], other[: high - low]
        if high - low == size and high + width <= end:
            stretches(sums, more, left, kept, rank, size, row)
            add(out[low + width - start : high + width - start], more, scale)
        elif low < high:
            stretch(sums, left, kept, rank, size, row, low - row * width - first)
        if low < high:
            add(out[low - start : high - start], sums, scale)
        row += 2 if high - low == size and high + width <= end else 1

@njit(**FAST)
def run(start, rank, width, scale, step, left, right, kept, out, space, other, result):
    for first in range(0, width, step):
        last = min(first + step, width)
        begin = start // width * width
        if start < begin + last or begin + width + first < start + out.shape[0]:
            keep(kept, right, rank, width, first, last - first)
            rows(start, rank, width, scale, first, last, left, kept, out, space, other)
'''


@cache
def _kernel() -> Kernel:
    parameters = (
        ("start", "int64"), ("rank", "int64"), ("width", "int64"), ("scale", "float32"), ("step", "int64"),
        ("left", "[float32]"), ("right", "[float32]"), ("kept", "[float32]"), ("out", "[float32]"),
    )  # fmt: skip
    scratch = (("space", "float32", _WIDTH), ("other", "float32", _WIDTH))
    return load(Generated(f"{_HEAD}\n{_PARTS}", parameters, scratch))


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
        step = min(_WIDTH, max(_LEAST, _KEPT // rank // 16 * 16))
        kept = np.empty(rank * step, np.float32)
        _kernel()(start, rank, width, np.float32(scale), step, left.reshape(-1), right.reshape(-1), kept, out)

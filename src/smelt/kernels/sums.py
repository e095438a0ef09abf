"""Sums and dot products in fp64 whose result does not depend on threads, tiles or order.

A tensor is cut into blocks of 4096 elements from its first element on (the compiled kernels do that). Inside
a block eight fixed lanes add up and are folded in a fixed tree, below; the block sums are then added exactly
(``math.fsum``), so any order of blocks gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .scalars import FAST


@njit(**FAST)
def total(x: Any) -> Any:
    """The sum of a row of numbers."""
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = 0.0
    whole = x.shape[0] // 8
    for j in range(whole):
        i = j * 8
        s0 += np.float64(x[i])
        s1 += np.float64(x[i + 1])
        s2 += np.float64(x[i + 2])
        s3 += np.float64(x[i + 3])
        s4 += np.float64(x[i + 4])
        s5 += np.float64(x[i + 5])
        s6 += np.float64(x[i + 6])
        s7 += np.float64(x[i + 7])
    rest = 0.0
    for i in range(whole * 8, x.shape[0]):
        rest += np.float64(x[i])
    return ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)) + rest


@njit(**FAST)
def dot(x: Any, y: Any) -> Any:
    """The dot product of two rows; products of float32 are exact in fp64."""
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = 0.0
    whole = x.shape[0] // 8
    for j in range(whole):
        i = j * 8
        s0 += np.float64(x[i]) * np.float64(y[i])
        s1 += np.float64(x[i + 1]) * np.float64(y[i + 1])
        s2 += np.float64(x[i + 2]) * np.float64(y[i + 2])
        s3 += np.float64(x[i + 3]) * np.float64(y[i + 3])
        s4 += np.float64(x[i + 4]) * np.float64(y[i + 4])
        s5 += np.float64(x[i + 5]) * np.float64(y[i + 5])
        s6 += np.float64(x[i + 6]) * np.float64(y[i + 6])
        s7 += np.float64(x[i + 7]) * np.float64(y[i + 7])
    rest = 0.0
    for i in range(whole * 8, x.shape[0]):
        rest += np.float64(x[i]) * np.float64(y[i])
    return ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)) + rest

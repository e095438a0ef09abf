"""Sums and dot products in fp64 whose result does not depend on threads, tiles or order.

A tensor is cut into blocks of 4096 elements from its first element on (the compiled kernels do that; a shorter
block is filled up with zeros). A block is folded in a fixed tree: its quarters are added up element by element,
then the halves of what is left, again and again. The block sums are added exactly (``math.fsum``), so any order
of blocks gives the same bits. Each step of the tree is a plain loop, which LLVM turns into vector code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .scalars import FAST


@njit(**FAST)
def total(x: Any, scratch: Any) -> Any:
    """The sum of 4096 numbers; ``scratch`` holds 1024 fp64."""
    a, b, c, d = x[:1024], x[1024:2048], x[2048:3072], x[3072:]
    for i in range(1024):
        scratch[i] = (np.float64(a[i]) + np.float64(b[i])) + (np.float64(c[i]) + np.float64(d[i]))
    return _folded(scratch)


@njit(**FAST)
def dot(x: Any, y: Any, scratch: Any) -> Any:
    """The dot product of 4096 pairs; products of float32 are exact in fp64."""
    a, b, c, d = x[:1024], x[1024:2048], x[2048:3072], x[3072:]
    e, f, g, h = y[:1024], y[1024:2048], y[2048:3072], y[3072:]
    for i in range(1024):
        first = np.float64(a[i]) * np.float64(e[i]) + np.float64(b[i]) * np.float64(f[i])
        second = np.float64(c[i]) * np.float64(g[i]) + np.float64(d[i]) * np.float64(h[i])
        scratch[i] = first + second
    return _folded(scratch)


@njit(**FAST)
def _folded(scratch: Any) -> Any:
    half = 512
    while half > 0:
        low, high = scratch[:half], scratch[half : 2 * half]
        for i in range(half):
            low[i] += high[i]
        half //= 2
    return scratch[0]

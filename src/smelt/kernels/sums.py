"""Sums and dot products in fp64 whose result does not depend on threads, tiles or order.

A tensor is cut into blocks of 4096 elements from its first element on. Inside a block eight fixed lanes
add up and are folded in a fixed tree; the block sums are then added exactly (``math.fsum``), so any order
of blocks gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

#: Elements per block. Tiles start at multiples of it.
BLOCK = 4096

_FAST = {"nogil": True, "error_model": "numpy", "boundscheck": False, "cache": True}


@njit(**_FAST)
def block_sums(rows: Any, partials: Any) -> None:
    """Sum each row of ``rows`` (k, n) per block into ``partials`` (blocks, k)."""
    lanes = np.zeros(8, np.float64)
    for block in range(partials.shape[0]):
        first, last = block * 4096, min(block * 4096 + 4096, rows.shape[1])
        for k in range(rows.shape[0]):
            _add_lanes(rows[k, first:last], lanes)
            partials[block, k] = _fold(lanes)


@njit(**_FAST)
def block_products(rows: Any, partials: Any) -> None:
    """Products of each pair of rows a <= b, summed per block into ``partials`` (blocks, pairs)."""
    lanes = np.zeros(8, np.float64)
    for block in range(partials.shape[0]):
        first, last = block * 4096, min(block * 4096 + 4096, rows.shape[1])
        pair = 0
        for a in range(rows.shape[0]):
            for b in range(a, rows.shape[0]):
                _multiply_lanes(rows[a, first:last], rows[b, first:last], lanes)
                partials[block, pair] = _fold(lanes)
                pair += 1


@njit(**_FAST)
def _add_lanes(row: Any, lanes: Any) -> None:
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = 0.0
    whole = row.shape[0] // 8
    for j in range(whole):
        i = j * 8
        s0 += np.float64(row[i])
        s1 += np.float64(row[i + 1])
        s2 += np.float64(row[i + 2])
        s3 += np.float64(row[i + 3])
        s4 += np.float64(row[i + 4])
        s5 += np.float64(row[i + 5])
        s6 += np.float64(row[i + 6])
        s7 += np.float64(row[i + 7])
    lanes[0], lanes[1], lanes[2], lanes[3] = s0, s1, s2, s3
    lanes[4], lanes[5], lanes[6], lanes[7] = s4, s5, s6, s7
    for i in range(whole * 8, row.shape[0]):
        lanes[i - whole * 8] += np.float64(row[i])


@njit(**_FAST)
def _multiply_lanes(x: Any, y: Any, lanes: Any) -> None:
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
    lanes[0], lanes[1], lanes[2], lanes[3] = s0, s1, s2, s3
    lanes[4], lanes[5], lanes[6], lanes[7] = s4, s5, s6, s7
    for i in range(whole * 8, x.shape[0]):
        lanes[i - whole * 8] += np.float64(x[i]) * np.float64(y[i])


@njit(**_FAST)
def _fold(s: Any) -> Any:
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))


def partial_sums(rows: npt.NDArray[Any], products: bool) -> npt.NDArray[np.float64]:
    """Block sums of ``rows`` (k, n), float32 or float64: (blocks, k), or (blocks, k*(k+1)/2) products."""
    k, n = rows.shape
    partials = np.empty((-(-n // BLOCK), k * (k + 1) // 2 if products else k))
    (block_products if products else block_sums)(rows, partials)
    return partials

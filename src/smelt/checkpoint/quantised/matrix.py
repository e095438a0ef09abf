"""Quantised matrices read piece by piece: the codes and scales of a run of elements, and the values that they give.

A tensor is one matrix or several of equal shape, one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...kernels.dequantise import Floats, Packing, dequantise
from ...kernels.dtypes import DTYPES
from ..base import Checkpoint
from .planes import Array, Grid, Window, stored_block, windows


@dataclass(frozen=True)
class Codes:
    """The stored codes of ``rows`` x ``columns`` matrices. ``arrange`` brings what was read into the packing's order.

    ``items``: stored items per row (of words, for codes packed down).
    """

    checkpoint: Checkpoint
    name: str
    packing: Packing
    rows: int
    columns: int
    items: int
    arrange: Callable[[Array], Array] | None = None

    def read(self, window: Window) -> tuple[Array, int, int]:
        """The packed codes (flat), how far their rows are apart, and where in a row (or word) they begin, in bits."""
        if self.packing.down:
            return self._words(window)
        stored = DTYPES[self.checkpoint.tensors[self.name].dtype].storage
        bits = 8 * np.dtype(stored).itemsize
        item = window.c0 * self.packing.bits // bits
        after = -(-window.c1 * self.packing.bits // bits)
        first = (window.matrix * self.rows + window.r0) * self.items + item
        block = stored_block(self.checkpoint, self.name, first, self.items, window.r1 - window.r0, after - item)
        block = block if self.arrange is None else self.arrange(block)
        packed = block.view(np.uint8)
        return packed.reshape(-1), packed.shape[1], window.c0 * self.packing.bits - item * bits

    def _words(self, window: Window) -> tuple[Array, int, int]:
        """The words that codes of some columns lie in."""
        bits, width = self.packing.bits, window.c1 - window.c0
        begin, end = window.r0 * bits // 32, -(-window.r1 * bits // 32)
        first = (window.matrix * -(-self.rows * bits // 32) + begin) * self.items + window.c0
        block = stored_block(self.checkpoint, self.name, first, self.items, end - begin, width)
        return block.view(np.uint32).reshape(-1), width, window.r0 * bits - 32 * begin


@dataclass(frozen=True)
class Matrix:
    """Matrices of codes on a grid of scales, read as ``dtype``."""

    codes: Codes
    table: Floats
    grid: Grid
    dtype: str

    def __call__(self, window: Window) -> Array:
        """A window as an array of the dtype's storage type: as ``F32``, a :data:`Plane`."""
        out = np.empty(window.shape, DTYPES[self.dtype].storage)
        self.fill(window, out)
        return out

    def fill(self, window: Window, out: Array) -> None:
        packed, stride, phase = self.codes.read(window)
        dequantise(packed, stride, phase, self.codes.packing, self.table, self.grid.scales(window), self.dtype, out)

    def read(self, start: int, out: Array) -> None:
        """Fill ``out`` with elements from ``start`` on, rows as they are stored."""
        done = 0
        for window in windows(start, len(out), self.codes.rows, self.codes.columns):
            rows, columns = window.shape
            part = out[done : done + rows * columns]
            self.fill(window, part.reshape(rows, columns))
            done += len(part)

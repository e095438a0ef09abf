"""Matrices whose logical rows are stored as columns, and what is remembered so that a column is not read for itself.

A column lies all over its tensor: so bands of columns are read at once, and strips of whole rows made of them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ...kernels.dequantise import Scales, dequantise
from ...kernels.dtypes import DTYPES
from .matrix import Matrix
from .planes import Array, Window

#: The bytes of a band of stored columns, and of a strip of the rows that they become.
BAND = 4 << 20
STRIP = 4 << 20

#: How many of each a checkpoint remembers, and the memory that this takes about, scales included.
_BANDS, _STRIPS = 2, 4
HELD = 2 * _BANDS * BAND + _STRIPS * STRIP


class _Entry:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.value: Any = None


class Recent:
    """The results that were asked for last, ``most`` of them. Whoever wants one that is being made waits for it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: OrderedDict[Any, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        with self._lock:
            entry = self._held.setdefault(key, _Entry())
            self._held.move_to_end(key)
            if len(self._held) > self._most:
                self._held.popitem(last=False)
        with entry.lock:
            if entry.value is None:
                entry.value = make()
            return entry.value


class Bands:
    """What a checkpoint remembers of its turned matrices: bands of columns as they are stored, and strips of rows."""

    def __init__(self) -> None:
        self.packed, self.strips = Recent(_BANDS), Recent(_STRIPS)


@dataclass(frozen=True)
class Turned:
    """The transpose of matrices: what is read as a row is stored as a column.

    A strip is some whole rows, dequantised; a band is the stored columns of several strips.
    """

    matrix: Matrix
    bands: Bands = field(default_factory=Bands)

    def read(self, start: int, out: Array) -> None:
        """Fill ``out`` with elements from ``start`` on, in the order of the transpose."""
        codes, done = self.matrix.codes, 0
        while done < len(out):
            row, column = divmod(start + done, codes.rows)
            number, row = divmod(row, codes.columns)
            first = row // self._width * self._width
            strip = self._strip(number, first)
            part = strip[(row - first) * codes.rows + column :][: len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)

    @cached_property
    def _width(self) -> int:
        """Rows per strip."""
        size = self.matrix.codes.rows * np.dtype(DTYPES[self.matrix.dtype].storage).itemsize
        return min(self.matrix.codes.columns, max(32, STRIP // size // 32 * 32))

    def _strip(self, number: int, first: int) -> Array:
        """All rows from ``first`` on that a strip has, one after another."""
        key = (self.matrix.codes.name, number, first)
        found: Array = self.bands.strips.get(key, lambda: self._made(number, first))
        return found

    def _made(self, number: int, first: int) -> Array:
        codes = self.matrix.codes
        strips = max(1, 8 * BAND // (self._width * codes.rows * codes.packing.bits))
        begin = first // (strips * self._width) * strips * self._width
        band = Window(number, 0, codes.rows, begin, min(begin + strips * self._width, codes.columns))
        packed, scales = self.bands.packed.get((codes.name, number, begin), lambda: self._band(band))
        width = min(self._width, codes.columns - first)
        out = np.empty((width, codes.rows), DTYPES[self.matrix.dtype].storage)
        column, packing = first - begin, codes.packing
        dequantise(
            packed.reshape(-1)[column if packing.down else 0 :], packed.shape[1],
            0 if packing.down else column * packing.bits, packing, self.matrix.table,
            scales.columns(column, column + width), self.matrix.dtype, out, turned=True,
        )  # fmt: skip
        return out.reshape(-1)

    def _band(self, band: Window) -> tuple[Array, Scales]:
        packed, stride, _ = self.matrix.codes.read(band)
        return packed.reshape(-1, stride), self.matrix.grid.scales(band)

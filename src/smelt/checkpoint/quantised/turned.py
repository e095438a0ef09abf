"""Matrices whose logical rows are stored as columns, and what is remembered so that a column is not read for itself.

A column lies all over its tensor: so bands of columns are read at once, and strips of whole rows made of them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from ...kernels.dequantise import Scales, dequantise
from ...kernels.dtypes import DTYPES
from .matrix import Matrix
from .planes import Array, Window

#: The bytes of a band of stored columns, and of a strip of the rows that they become.
BAND = 8 << 20
STRIP = 4 << 20

#: How many of each a checkpoint remembers, and the memory that this takes about: with scales, and one of each that
#: waits to be written over.
_BANDS, _STRIPS = 2, 4
HELD = _BANDS * BAND * 3 // 2 + (_STRIPS + 1) * STRIP


class _Entry:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.value: Any = None
        self.users = 0


class Recent:
    """The results that were asked for last, ``most`` of them, and those in use.

    Whoever wants one that is being made waits for it. What is forgotten is lent to whoever makes the next one: memory
    that has been written before costs no page faults.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: OrderedDict[Any, _Entry] = OrderedDict()
        self._spare: Any = None
        self._lock = threading.Lock()

    @contextmanager
    def lent(self, key: Any, make: Callable[[Any], Any]) -> Iterator[Any]:
        """What ``make`` gives for ``key``; it is told of a forgotten result to write over, or None."""
        entry = self._taken(key)
        try:
            with entry.lock:
                if entry.value is None:
                    with self._lock:
                        spare, self._spare = self._spare, None
                    entry.value = make(spare)
            yield entry.value
        finally:
            with self._lock:
                entry.users -= 1

    def forget(self, key: Any) -> None:
        """Nobody is likely to ask for ``key`` again: the next is written over it while it lies in the caches."""
        with self._lock:
            if key in self._held and not self._held[key].users:
                self._spare = self._held.pop(key).value

    def _taken(self, key: Any) -> _Entry:
        with self._lock:
            entry = self._held.setdefault(key, _Entry())
            entry.users += 1
            self._held.move_to_end(key)
            idle = [old for old, held in self._held.items() if not held.users]
            for old in idle[: max(0, len(self._held) - self._most)]:
                self._spare = self._held.pop(old).value
            return entry


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
            key = (codes.name, number, first)
            with self.bands.strips.lent(key, partial(self._made, number, first)) as strip:
                values = strip.view(out.dtype)[(row - first) * codes.rows + column :]
                left = self._end(first) * codes.rows - (row * codes.rows + column)
                part = values[: min(left, len(out) - done)]
                out[done : done + len(part)] = part
            if len(part) == left:  # tensors are read from the beginning to the end
                self.bands.strips.forget(key)
            done += len(part)

    @cached_property
    def _width(self) -> int:
        """Rows per strip."""
        size = self.matrix.codes.rows * np.dtype(DTYPES[self.matrix.dtype].storage).itemsize
        return min(self.matrix.codes.columns, max(32, STRIP // size // 32 * 32))

    def _end(self, first: int) -> int:
        """The row after the last of a strip."""
        return min(first + self._width, self.matrix.codes.columns)

    def _made(self, number: int, first: int, spare: Array | None) -> Array:
        """All rows from ``first`` on that a strip has, one after another, as bytes: there may be more."""
        codes, dtype = self.matrix.codes, np.dtype(DTYPES[self.matrix.dtype].storage)
        strips = max(1, 8 * BAND // (self._width * codes.rows * codes.packing.bits))
        begin = first // (strips * self._width) * strips * self._width
        band = Window(number, 0, codes.rows, begin, min(begin + strips * self._width, codes.columns))
        width = self._end(first) - first
        size = width * codes.rows * dtype.itemsize
        held = spare if spare is not None and len(spare) >= size else np.empty(max(size, STRIP), np.uint8)
        out = held[:size].view(dtype).reshape(width, codes.rows)
        column, packing = first - begin, codes.packing
        with self.bands.packed.lent((codes.name, number, begin), lambda _: self._band(band)) as (packed, scales):
            dequantise(
                packed.reshape(-1)[column if packing.down else 0 :], packed.shape[1],
                0 if packing.down else column * packing.bits, packing, self.matrix.table,
                scales.columns(column, column + width), self.matrix.dtype, out, turned=True,
            )  # fmt: skip
        return held

    def _band(self, band: Window) -> tuple[Array, Scales]:
        packed, stride, _ = self.matrix.codes.read(band)
        return packed.reshape(-1, stride), self.matrix.grid.scales(band)

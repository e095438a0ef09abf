"""Quantised matrices read piece by piece: which codes and scales a run of elements needs, and how they are found.

A tensor is one matrix or several of equal shape, one after another. Matrices whose logical rows are stored as
columns are read in bands of columns, of which a few are remembered, because a column lies all over its tensor.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputRejected, show
from ...kernels.dequantise import Floats, Packing, Scales, dequantise
from ...kernels.dtypes import DTYPES
from ..base import Checkpoint

Array = npt.NDArray[Any]

#: The bytes of codes in a band, and how many bands a checkpoint remembers.
BAND = 4 << 20
_BANDS = 4

#: Elements that are dequantised before they are turned: a block that fits into the fast caches.
_TURNED = 1 << 13


@dataclass(frozen=True)
class Window:
    """Rows r0 .. r1 and columns c0 .. c1 of matrix number ``matrix``."""

    matrix: int
    r0: int
    r1: int
    c0: int
    c1: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.r1 - self.r0, self.c1 - self.c0


#: What gives the numbers of a window as float32.
Plane = Callable[[Window], Floats]


def windows(start: int, count: int, rows: int, columns: int) -> Iterator[Window]:
    """The elements start .. start + count of matrices in order: whole rows, and parts of the first and the last."""
    end = start + count
    while start < end:
        row, column = divmod(start, columns)
        matrix, r0 = divmod(row, rows)
        if column or end - start < columns:
            c1 = min(columns, column + end - start)
            yield Window(matrix, r0, r0 + 1, column, c1)
            start += c1 - column
        else:
            r1 = min(rows, r0 + (end - start) // columns)
            yield Window(matrix, r0, r1, 0, columns)
            start += (r1 - r0) * columns


def stored_block(checkpoint: Checkpoint, name: str, first: int, stride: int, rows: int, width: int) -> Array:
    """``rows`` stretches of ``width`` stored items, ``stride`` apart, and an empty row that may be read beyond them."""
    block = np.empty((rows + 1, width), DTYPES[checkpoint.tensors[name].dtype].storage)
    block[rows] = 0
    if width == stride or rows == 1:
        checkpoint.read(name, first, block[:rows].reshape(-1))
    else:
        checkpoint.read_runs(name, first + stride * np.arange(rows, dtype=np.int64), block[:rows])
    return block


@dataclass(frozen=True)
class StoredPlane:
    """A stored tensor as (matrices, ``rows``, ``columns``) of floats; one number, or one matrix, may serve all.

    U8 and F8_E8M0 are exponents of two, 127 standing for 1. InputRejected for NaN among them.
    """

    checkpoint: Checkpoint
    name: str
    rows: int
    columns: int
    shared: bool = False

    def __call__(self, window: Window) -> Floats:
        first = (0 if self.shared else window.matrix * self.rows) + window.r0
        rows, width = window.shape
        block = stored_block(
            self.checkpoint, self.name, first * self.columns + window.c0, self.columns, rows, width
        )[:rows]  # fmt: skip
        info = self.checkpoint.tensors[self.name]
        if info.dtype in ("U8", "F8_E8M0"):
            if (block == 255).any():
                where = f" in {show(info.file)}" if info.file else ""
                raise InputRejected(
                    f"{self.checkpoint.label}: tensor {show(self.name)}{where} holds 255 as a scale, which is NaN"
                )
            return np.ldexp(np.float32(1), block.astype(np.int32) - 127)
        return np.ascontiguousarray(DTYPES[info.dtype].as_values(block), np.float32)


@dataclass(frozen=True)
class Index:
    """A stored tensor that names the group of every row (or column), checked against the number of groups."""

    checkpoint: Checkpoint
    name: str
    length: int
    groups: int

    def __call__(self, matrix: int, first: int, last: int) -> npt.NDArray[np.int64]:
        info = self.checkpoint.tensors[self.name]
        stored = np.empty(last - first, DTYPES[info.dtype].storage)
        self.checkpoint.read(self.name, matrix * self.length + first, stored)
        found = stored.astype(np.int64)
        if len(found) and not 0 <= found.min() <= found.max() < self.groups:
            wrong = found[(found < 0) | (found >= self.groups)][0]
            where = f" in {show(info.file)}" if info.file else ""
            raise InputRejected(
                f"{self.checkpoint.label}: tensor {show(self.name)}{where} names group {wrong}, there are {self.groups}"
            )
        return found


@dataclass(frozen=True)
class Grid:
    """Scales and zero points that ``height`` rows and ``width`` columns share, or those that an index gathers."""

    scale: Plane
    height: int
    width: int
    zero: Plane | None = None
    row_index: Index | None = None
    column_index: Index | None = None
    factor: float = 1.0

    def scales(self, window: Window) -> Scales:
        """What the elements of a window need."""
        rows = _groups(self.row_index, window.matrix, window.r0, window.r1, self.height)
        columns = _groups(self.column_index, window.matrix, window.c0, window.c1, self.width)
        r0, r1, c0, c1 = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        part = Window(window.matrix, int(r0), int(r1), int(c0), int(c1))
        return Scales(
            scale=self.scale(part),
            row_group=(rows - r0).astype(np.uint32),
            column_group=(columns - c0).astype(np.uint32),
            zero=None if self.zero is None else self.zero(part),
            factor=self.factor,
        )


def _groups(index: Index | None, matrix: int, first: int, last: int, size: int) -> npt.NDArray[np.int64]:
    return np.arange(first, last) // size if index is None else index(matrix, first, last)


class Bands:
    """The bands of columns that were read last."""

    def __init__(self) -> None:
        self._held: OrderedDict[Any, tuple[Array, Scales]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, make: Callable[[], tuple[Array, Scales]]) -> tuple[Array, Scales]:
        with self._lock:  # whoever wants the same band waits, rather than reads it too
            if key not in self._held:
                self._held[key] = make()
            self._held.move_to_end(key)
            while len(self._held) > _BANDS:
                self._held.popitem(last=False)
            return self._held[key]


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
        """All the words of some columns."""
        height = -(-self.rows * self.packing.bits // 32)
        first, width = window.matrix * height * self.items + window.c0, window.c1 - window.c0
        block = stored_block(self.checkpoint, self.name, first, self.items, height, width)
        return block.view(np.uint32).reshape(-1), width, window.r0


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


@dataclass(frozen=True)
class Turned:
    """The transpose of matrices: what is read as a row is stored as a column."""

    matrix: Matrix
    bands: Bands = field(default_factory=Bands)

    def read(self, start: int, out: Array) -> None:
        codes, done = self.matrix.codes, 0
        for window in windows(start, len(out), codes.columns, codes.rows):
            rows, columns = window.shape
            part = out[done : done + rows * columns]
            self._fill(window, part.reshape(rows, columns))
            done += len(part)

    def _fill(self, window: Window, out: Array) -> None:
        """``window`` counts rows and columns as they are read."""
        width = self._band_width()
        for first in range(window.r0 // width * width, window.r1, width):
            last = min(first + width, self.matrix.codes.columns)
            r0, r1 = max(first, window.r0), min(last, window.r1)
            part = Window(window.matrix, r0, r1, window.c0, window.c1)
            self._from_band(part, first, last, out[r0 - window.r0 : r1 - window.r0])

    def _band_width(self) -> int:
        """Stored columns per band: all of them in small matrices."""
        codes = self.matrix.codes
        most = 8 * BAND // (codes.rows * codes.packing.bits)
        return codes.columns if most >= codes.columns else max(64, most // 64 * 64)

    def _from_band(self, window: Window, first: int, last: int, out: Array) -> None:
        codes = self.matrix.codes
        band = Window(window.matrix, 0, codes.rows, first, last)
        packed, scales = self.bands.get((codes.name, window.matrix, first), lambda: self._band(band))
        scales = scales.columns(window.r0 - first, window.r1 - first)
        width = window.r1 - window.r0
        step = max(32, _TURNED // width)
        for c0 in range(window.c0, window.c1, step):
            c1 = min(c0 + step, window.c1)
            block = np.empty((c1 - c0, width), out.dtype)
            self._block(packed, scales, window.r0 - first, c0, c1, block)
            out[:, c0 - window.c0 : c1 - window.c0] = block.T

    def _band(self, band: Window) -> tuple[Array, Scales]:
        packed, stride, _ = self.matrix.codes.read(band)
        return packed.reshape(-1, stride), self.matrix.grid.scales(band)

    def _block(self, packed: Array, scales: Scales, column: int, c0: int, c1: int, block: Array) -> None:
        """Stored rows c0 .. c1 of a band from its column ``column`` on."""
        packing, stride = self.matrix.codes.packing, packed.shape[1]
        flat = packed.reshape(-1)[column:] if packing.down else packed[c0:].reshape(-1)
        phase = c0 if packing.down else column * packing.bits
        dequantise(flat, stride, phase, packing, self.matrix.table, scales.rows(c0, c1), self.matrix.dtype, block)

"""Windows of stored tensors as numbers: scales, zero points, and the index of what shares them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputRejected, show
from ...kernels.dequantise import Floats, Scales
from ...kernels.dtypes import DTYPES
from ..base import Checkpoint

Array = npt.NDArray[Any]

#: Shorter stretches are not read one by one: the rows that they lie in are read whole.
SHORT = 1 << 10
CHUNK = 1 << 20


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
    elif block[0].nbytes >= SHORT:
        checkpoint.read_runs(name, first + stride * np.arange(rows, dtype=np.int64), block[:rows])
    else:
        _read_across(checkpoint, name, first, stride, block[:rows])
    return block


def _read_across(checkpoint: Checkpoint, name: str, first: int, stride: int, block: Array) -> None:
    """The same by reading all that lies between the stretches, some rows at a time."""
    rows, width = block.shape
    step = max(1, CHUNK // (stride * block.itemsize))
    for row in range(0, rows, step):
        part = block[row : row + step]
        between = np.empty((len(part) - 1) * stride + width, block.dtype)
        checkpoint.read(name, first + row * stride, between)
        part[:-1] = between[: (len(part) - 1) * stride].reshape(-1, stride)[:, :width]
        part[-1] = between[-width:]


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

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """How many scales a matrix has."""
        return -(-rows // self.height), -(-columns // self.width)

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

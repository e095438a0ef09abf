"""Tiles: runs of elements of one output tensor, and the reused memory that their operands are read into.

A tile is always the same number of elements, whatever the machine: block sums, random blocks and digests
never depend on anything but the tensor.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.dtypes import DTYPES
from ..kernels.launch import Arrays
from ..kernels.program import ByRow, Operand
from .matrices import compute

#: Elements per tile: 1 MB of bfloat16. A multiple of the sum block (4096) and the random block (1024).
TILE = 1 << 19


class BufferPool:
    """Lends byte buffers and takes them back, because fresh memory costs a page fault per 4 KB."""

    def __init__(self) -> None:
        self._free: dict[int, list[npt.NDArray[np.uint8]]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, count: int, dtype: str) -> npt.NDArray[Any]:
        """An uninitialised array of ``count`` elements in the storage type of ``dtype``."""
        storage = np.dtype(DTYPES[dtype].storage)
        size = _size_class(count * storage.itemsize)
        with self._lock:
            stack = self._free[size]
            buffer = stack.pop() if stack else np.empty(size, np.uint8)
        return buffer[: count * storage.itemsize].view(storage)

    def give(self, array: npt.NDArray[Any]) -> None:
        """Take back an array that :meth:`take` lent; nobody may use it afterwards."""
        buffer = array
        while isinstance(buffer.base, np.ndarray):
            buffer = buffer.base
        with self._lock:
            self._free[buffer.nbytes].append(buffer)


def _size_class(nbytes: int) -> int:
    """Round up to 4 KB, or to whole tiles' sizes above, so that buffers fit again."""
    size = 4096
    while size < nbytes:
        size *= 2
    return size


class Tile:
    """Elements ``start`` .. ``start + count`` of one output tensor; its operands are read when first used.

    A tile is released after each pass and read again by the next: reading from the system's page cache into
    a small, warm buffer is as fast as going through a large one of our own, and needs no memory.
    """

    __slots__ = ("_arrays", "_pool", "bytes_read", "count", "start")

    def __init__(self, start: int, count: int, pool: BufferPool) -> None:
        self.start = start
        self.count = count
        self.bytes_read = 0
        self._pool = pool
        self._arrays: dict[int, npt.NDArray[Any]] = {}

    def __call__(self, operand: Operand) -> npt.NDArray[Any]:
        """The operand's elements of this tile, as stored."""
        array = self._arrays.get(id(operand))
        if array is None:
            array = self._pool.take(self.count, operand.dtype)
            operand.read(self.start, array)
            self.bytes_read += array.nbytes
            self._arrays[id(operand)] = array
        return array

    def window(self, first: int, count: int) -> Arrays:
        """Access to ``count`` elements from ``first`` on alone, without reading the rest of the tile."""

        def read(operand: Operand) -> npt.NDArray[Any]:
            array = self._arrays.get(id(operand))
            if array is not None:
                return array[first : first + count]
            small = np.empty(count, DTYPES[operand.dtype].storage)
            operand.read(self.start + first, small)
            return small

        return read

    def release(self) -> None:
        """Give the operands' memory back."""
        for array in self._arrays.values():
            self._pool.give(array)
        self._arrays.clear()


class RowTile(Tile):
    """Some whole rows: those that begin inside tile ``index``.

    What is read begins where the tile begins, so that every tile of the tensor is read whole once, which is
    what input digests are made of; only what a row has in the next tile is read twice.
    """

    __slots__ = ("_lead",)

    def __init__(self, index: int, start: int, count: int, pool: BufferPool) -> None:
        super().__init__(start, count, pool)
        self._lead = start - index * TILE

    def __call__(self, operand: Operand) -> npt.NDArray[Any]:
        array = self._arrays.get(id(operand))
        if isinstance(operand, ByRow):
            return self._computed(operand) if array is None else array
        if array is None:
            array = self._pool.take(self._lead + self.count, operand.dtype)
            for at in range(0, len(array), TILE):
                operand.read(self.start - self._lead + at, array[at : at + TILE])
            self.bytes_read += array.nbytes
            self._arrays[id(operand)] = array
        return array[self._lead :]

    def _computed(self, operand: ByRow) -> npt.NDArray[Any]:
        array = self._pool.take(self.count, operand.dtype)
        compute(operand, self, array)
        self._arrays[id(operand)] = array
        return array


def rows_of(count: int, length: int, pool: BufferPool) -> list[Tile]:
    """The rows of a tensor of ``count`` elements, in order, as tiles of about the usual size."""
    found: list[Tile] = []
    for index, first in enumerate(range(0, count, TILE)):
        start = -(-first // length) * length
        end = min(count, -(-min(first + TILE, count) // length) * length)
        if start < end:
            found.append(RowTile(index, start, end - start, pool))
    return found


def tiles_of(count: int, pool: BufferPool) -> list[Tile]:
    """The tiles of a tensor of ``count`` elements, in order; none when it is empty."""
    return [Tile(start, min(TILE, count - start), pool) for start in range(0, count, TILE)]

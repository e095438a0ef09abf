"""Which of several equal magnitudes are kept: the first or the last ones, so tiles have to know what came before them.

Every tile counts its own equal magnitudes, then takes the count of all tiles before it. Tiles are started in
order, so whoever waits waits for tiles that are already running.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import OperationFailed
from ..kernels.generate import precision_of
from ..kernels.launch import run_equal, run_magnitudes
from ..kernels.order import bits_of
from ..kernels.program import Call, Operand, Quota, Step
from ..kernels.random import BLOCK
from .tiles import TILE, RowTile, Tile

_NONE = np.zeros(1, np.int64)


class Quotas:
    """The quotas of one tensor's formulas, over all of its passes."""

    def __init__(self) -> None:
        self._counters: dict[int, _Counter] = {}
        self._lock = threading.Lock()
        self._aborted = False

    def resolved(self, call: Call, tile: Tile) -> Call:
        """``call`` with what each quota comes to in this tile."""
        if not any(isinstance(item, Quota) for item in call.items()):
            return call
        if isinstance(tile, RowTile):
            raise TypeError("a Quota counts tile by tile: it cannot stand beside what is computed by rows")
        return replace(call, arguments={name: self._value(value, tile) for name, value in call.arguments.items()})

    def _value(self, value: Any, tile: Tile) -> Any:
        if isinstance(value, tuple):
            return type(value)(self._value(item, tile) for item in value)
        return self._counter(value).value(tile) if isinstance(value, Quota) else value

    def _counter(self, quota: Quota) -> _Counter:
        with self._lock:
            if self._aborted:
                raise OperationFailed("stopped, because another part of the tensor failed")
            if id(quota) not in self._counters:
                self._counters[id(quota)] = _Counter(quota)
            return self._counters[id(quota)]

    def abort(self) -> None:
        """A tile failed: the tiles that wait for its count must not wait any longer."""
        with self._lock:
            self._aborted = True
        for counter in self._counters.values():
            counter.abort()


class _Counter:
    """The equal magnitudes seen so far, tile by tile."""

    def __init__(self, quota: Quota) -> None:
        kind = np.float64 if precision_of(quota.call) == "float64" else np.float32
        self._quota = quota
        self._bits = bits_of(quota.magnitude, 63 if kind is np.float64 else 31)
        above = float(np.nextafter(kind(quota.magnitude), kind(np.inf)))
        self._first, self._rest = (above, quota.magnitude) if quota.stopped else (quota.magnitude, above)
        self._before = {0: 0}  # index of a tile -> equal magnitudes before it
        self._values: dict[int, float | Step] = {}
        self._changed = threading.Condition()
        self._aborted = False

    def value(self, tile: Tile) -> float | Step:
        """The threshold in this tile, as it must be compared with >=."""
        index = tile.start // TILE
        if index not in self._values:
            call, quota = self._quota.call, self._quota
            spent = self._before.get(index, 0) >= quota.first
            blocks = _NONE if spent else run_equal(call, tile, tile.start, tile.count, self._bits)
            self._values[index] = self._threshold(tile, self._passed(index, int(blocks.sum())), blocks)
        return self._values[index]

    def _passed(self, index: int, equal: int) -> int:
        with self._changed:
            self._changed.wait_for(lambda: index in self._before or self._aborted)
            if self._aborted:
                raise OperationFailed("stopped, because another part of the tensor failed")
            self._before[index + 1] = self._before[index] + equal
            self._changed.notify_all()
            return self._before[index]

    def _threshold(self, tile: Tile, passed: int, blocks: npt.NDArray[np.int64]) -> float | Step:
        left = self._quota.first - passed
        if left <= 0:
            return self._rest
        totals = blocks.cumsum()
        if totals[-1] <= left:
            return self._first
        block = int(np.searchsorted(totals, left))
        left -= int(totals[block - 1]) if block else 0
        return Step(self._first, self._rest, self._nth_equal(tile, block * BLOCK, left) + 1)

    def _nth_equal(self, tile: Tile, first: int, nth: int) -> int:
        """The index of the ``nth`` equal magnitude in the block of the tile that begins at ``first``."""
        count = min(BLOCK, tile.count - first)

        def block(operand: Operand) -> npt.NDArray[Any]:
            return tile(operand)[first : first + count]

        bits = run_magnitudes(self._quota.call, block, tile.start + first, count)
        return tile.start + first + int(np.flatnonzero(bits == self._bits)[nth - 1])

    def abort(self) -> None:
        with self._changed:
            self._aborted = True
            self._changed.notify_all()

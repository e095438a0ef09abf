"""Statistics over tiles: partial results in any order, one exact result.

Each reducer answers one request of a method. A pass hands it every tile of every call; what it returns per
tile is combined when the pass is complete. A reducer that is not ``done`` then asks for another pass.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..kernels.arrays import apply
from ..kernels.generate import precision_of
from ..kernels.launch import run_count, run_magnitudes, run_sums
from ..kernels.order import MAX_BINS, RankSearch
from ..kernels.program import Call, Draw, Each, Gram, Mask, Quota, Rank, Request, Rows, Step, Top, Totals, row_length
from .matrices import rows_called
from .tiles import TILE, Tile

#: What one pass yields: (index of the tile in its tensor, partial result), in order.
Partials = Sequence[tuple[int, Any]]


class Reducer(Protocol):
    """One request being answered."""

    calls: tuple[Call, ...]
    done: bool
    result: Any

    def row(self, call: Call) -> int | None:
        """Elements per row where ``call`` wants tiles of whole rows."""

    def tile(self, call: Call, tile: Tile) -> Any:
        """The partial result of one tile (runs on any thread)."""

    def absorb(self, partials: Partials) -> None:
        """Combine one pass."""


def reducer_for(request: Request) -> Reducer:
    if isinstance(request, Rank):
        return RankReducer(request)
    if isinstance(request, Top):
        return TopReducer(request)
    if isinstance(request, Rows):
        return RowsReducer(request)
    return SumReducer(request)


#: Elements of a sample that sets the first window of a rank search.
_SAMPLE = 1 << 15


class _Counters:
    """Histograms to count in, lent zeroed and taken back: fresh memory would cost a page fault per 4 KB."""

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.uint32]] = []

    def take(self, bins: int) -> npt.NDArray[np.uint32]:
        try:
            counts = self._free.pop()[:bins]
        except IndexError:
            return np.zeros(MAX_BINS, np.uint32)[:bins]
        counts[:] = 0
        return counts

    def give(self, counts: npt.NDArray[np.uint32]) -> None:
        self._free.append(counts.base)  # type: ignore[arg-type]


_COUNTERS = _Counters()


class RankReducer:
    """Exact k-th smallest magnitude: a sampling pass, then counting passes (:mod:`smelt.kernels.order`).

    A NaN is no error here: the pass that makes the output finds it, and says in which tensor of which model.
    """

    def __init__(self, request: Rank) -> None:
        self.calls = request.calls
        self.done = False
        self.result: Any = 0.0
        self._population = sum(call.count for call in self.calls)
        tiles = sum(-(-call.count // TILE) for call in self.calls)
        self._runs = max(1, 2 // tiles)
        self._run = self._population if self._population <= 4 * _SAMPLE else max(64, _SAMPLE // (tiles * self._runs))
        self._sampled = False
        self._search = RankSearch(request.rank, _bits(self.calls[0]))
        self._counts: dict[int, npt.NDArray[np.uint32]] = {}
        self._lock = threading.Lock()

    def row(self, call: Call) -> int | None:
        return None

    def tile(self, call: Call, tile: Tile) -> Any:
        if not self._sampled:
            return self._sample(call, tile)
        search = self._search
        return run_count(call, tile, tile.start, tile.count, search.low, search.width, self._counters())

    def _sample(self, call: Call, tile: Tile) -> npt.NDArray[Any]:
        """Magnitudes from a few places of the tile, because rows differ; of a small tensor all."""
        step = -(-tile.count // self._runs)
        if self._run >= step:
            return run_magnitudes(call, tile, tile.start, tile.count)
        firsts = range(0, tile.count - self._run, step)
        return np.concatenate(
            [run_magnitudes(call, tile.window(first, self._run), tile.start + first, self._run) for first in firsts]
        )

    def _counters(self) -> npt.NDArray[np.uint32]:
        """This thread's own counters: counts may be added up in any order."""
        thread = threading.get_ident()
        if thread not in self._counts:
            counts = _COUNTERS.take(self._search.bins)
            with self._lock:
                self._counts[thread] = counts
        return self._counts[thread]

    def absorb(self, partials: Partials) -> None:
        if not self._sampled:
            self._start(np.concatenate([bits for _, bits in partials]))
            return
        first, *others = self._counts.values()
        counts: npt.NDArray[Any] = first.astype(np.int64) if self._population >> 32 else first
        for other in others:
            counts += other
        if self._search.absorb(sum(below for _, below in partials), counts):
            self._end()
        for used in self._counts.values():
            _COUNTERS.give(used)
        self._counts.clear()

    def _start(self, sample: npt.NDArray[Any]) -> None:
        """A sample that is the whole answers at once; any other sets the first window."""
        self._sampled = True
        if len(sample) < self._population:
            self._search.guess(sample, self._population)
            return
        self._search.settle(sample)
        self._end()

    def _end(self) -> None:
        self.done = True
        self.result = self._answer(self._search)

    def _answer(self, search: RankSearch) -> Any:
        """The magnitude. NaN ranks above all numbers, and as a bar would keep nothing, as infinity does."""
        return math.inf if math.isnan(search.value) else search.value


class TopReducer(RankReducer):
    """The same search; equal magnitudes at the bar may not all be wanted."""

    def __init__(self, request: Top) -> None:
        super().__init__(Rank(request.calls, request.call.count - request.keep + 1))
        self._last = request.last

    def _answer(self, search: RankSearch) -> Any:
        unwanted = search.place - 1
        if not unwanted or math.isnan(search.value):
            return super()._answer(search)
        first = unwanted if self._last else search.equal - unwanted
        return Quota(self.calls[0], search.value, first, stopped=self._last)


def _bits(call: Call) -> int:
    return 63 if precision_of(call) == "float64" else 31


class SumReducer:
    """Totals and Gram matrices: fp64 block sums, added exactly."""

    def __init__(self, request: Totals | Gram) -> None:
        self.calls = request.calls
        self.done = False
        self.result: Any = None
        self._products = isinstance(request, Gram)
        self._width = _width_of(self.calls[0])

    def row(self, call: Call) -> int | None:
        return call.row

    def tile(self, call: Call, tile: Tile) -> Any:
        return run_sums(call, tile, tile.start, tile.count, self._width, self._products)

    def absorb(self, partials: Partials) -> None:
        columns = self._width * (self._width + 1) // 2 if self._products else self._width
        blocks = np.concatenate([np.zeros((0, columns)), *(part for _, part in partials)])
        sums = [math.fsum(column) for column in blocks.T.tolist()]
        self.result = _symmetric(sums, self._width) if self._products else sums
        self.done = True


def _symmetric(upper: list[float], width: int) -> list[list[float]]:
    """The whole matrix from its upper triangle, row by row."""
    matrix = np.zeros((width, width))
    rows, columns = np.triu_indices(width)
    matrix[rows, columns] = matrix[columns, rows] = upper
    return matrix.tolist()


def _width_of(call: Call) -> int:
    """How many numbers the formula returns: one for each item of an Each, else try it on one element."""
    for value in call.arguments.values():
        if isinstance(value, Each):
            return len(value)
    one = np.ones(1, precision_of(call))
    return len(apply(call.formula, {name: _stand_in(value, one) for name, value in call.arguments.items()}))


def _stand_in(value: Any, one: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_stand_in(item, one) for item in value)
    if isinstance(value, bool | Draw | Mask):
        return True
    return 1.0 if isinstance(value, int | float | Step | Quota) else one


class RowsReducer:
    """Numbers for each row, joined or added up in the order of the rows."""

    def __init__(self, request: Rows) -> None:
        self.calls = request.calls
        self.done = False
        self.result: Any = None
        self._total = request.total
        self._length = self.calls[0].count if request.whole else row_length(self.calls[0].operands()[0].shape)

    def row(self, call: Call) -> int | None:
        return self._length

    def tile(self, call: Call, tile: Tile) -> Any:
        tile.bytes_read += sum(change.nbytes for change in call.changes)
        return rows_called(call, tile, self._length)

    def absorb(self, partials: Partials) -> None:
        parts = [part for _, part in partials]
        self.result = sum(parts[1:], parts[0]) if self._total else np.concatenate(parts)
        self.done = True

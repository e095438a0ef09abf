"""Statistics over tiles: partial results in any order, one exact result.

Each reducer answers one request of a method. A pass hands it every tile of every call; what it returns per
tile is combined when the pass is complete. A reducer that is not ``done`` then asks for another pass.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
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


def reducers_for(requests: Sequence[Request], threads: int) -> list[Reducer]:
    """A reducer for each request of one pass, which ``threads`` threads make."""
    ranks = sum(isinstance(request, Rank | Top) for request in requests)
    return [_reducer(request, copies_of(ranks, threads)) for request in requests]


def _reducer(request: Request, copies: int) -> Reducer:
    if isinstance(request, Rank):
        return RankReducer(request, copies)
    if isinstance(request, Top):
        return TopReducer(request, copies)
    if isinstance(request, Rows):
        return RowsReducer(request)
    return SumReducer(request)


#: Elements of a sample that sets the first window of a rank search.
_SAMPLE = 1 << 15

#: Of so many elements all magnitudes are the sample.
SAMPLED_WHOLE = 4 * _SAMPLE


def copies_of(ranks: int, threads: int) -> int:
    """How many threads may count for one of so many searches at once: each finds one that has room."""
    return -(-threads // max(1, ranks))


def counters(ranks: int, threads: int) -> int:
    """Bytes that so many searches at once count in: those of one tensor, while some threads are at the next one's."""
    copies = copies_of(ranks, threads)
    return 4 * MAX_BINS * ranks * (copies + min(copies, threads - 1))


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


class _Histograms:
    """The counters of one pass of a search: at most ``copies``, so a thread may have to wait for another's."""

    def __init__(self, bins: int, copies: int) -> None:
        self._bins = bins
        self._room = threading.Semaphore(copies)
        self._free: list[npt.NDArray[np.uint32]] = []

    @contextmanager
    def lent(self) -> Iterator[npt.NDArray[np.uint32]]:
        with self._room:
            try:
                counts = self._free.pop()
            except IndexError:
                counts = _COUNTERS.take(self._bins)
            yield counts
            self._free.append(counts)

    def total(self, wide: bool) -> npt.NDArray[Any]:
        """All counts in one, once all are back; they may be added up in any order."""
        first, *others = self._free
        counts: npt.NDArray[Any] = first.astype(np.int64) if wide else first
        for other in others:
            counts += other
        return counts

    def give_back(self) -> None:
        for used in self._free:
            _COUNTERS.give(used)
        self._free.clear()


class RankReducer:
    """Exact k-th smallest magnitude: a sampling pass, then counting passes (:mod:`smelt.kernels.order`).

    Up to ``copies`` threads count at once. A NaN is no error here: the pass that makes the output finds it, and says
    in which tensor of which model.
    """

    def __init__(self, request: Rank, copies: int = 1) -> None:
        self.calls = request.calls
        self.done = False
        self.result: Any = 0.0
        self._population = sum(call.count for call in self.calls)
        self._tiles = sum(-(-call.count // TILE) for call in self.calls)
        self._runs = max(1, 2 // self._tiles)
        enough = max(64, _SAMPLE // (self._tiles * self._runs))
        self._run = self._population if self._population <= SAMPLED_WHOLE else enough
        self._sampled = self._found = False
        self._search = RankSearch(request.rank, _bits(self.calls[0]))
        self._copies, self._lock = copies, threading.Lock()

    def row(self, call: Call) -> int | None:
        return None

    def tile(self, call: Call, tile: Tile) -> Any:
        """Counts; the last tile of a pass ends it, so that its counters are free at once."""
        if not self._sampled:
            return self._sample(call, tile)
        search = self._search
        with self._histograms.lent() as counts:
            below = run_count(call, tile, tile.start, tile.count, search.low, search.width, counts)
        with self._lock:
            self._below += below
            self._left -= 1
            last = not self._left
        if last:
            self._combine()
        return None

    def _sample(self, call: Call, tile: Tile) -> npt.NDArray[Any]:
        """Magnitudes from a few places of the tile, because rows differ; of a small tensor all."""
        step = -(-tile.count // self._runs)
        if self._run >= step:
            return run_magnitudes(call, tile, tile.start, tile.count)
        firsts = range(0, tile.count - self._run, step)
        return np.concatenate(
            [run_magnitudes(call, tile.window(first, self._run), tile.start + first, self._run) for first in firsts]
        )

    def _count(self) -> None:
        """Begin a counting pass."""
        self._histograms = _Histograms(self._search.bins, self._copies)
        self._below, self._left = 0, self._tiles

    def _combine(self) -> None:
        self._found = self._search.absorb(self._below, self._histograms.total(wide=bool(self._population >> 32)))
        self._histograms.give_back()

    def absorb(self, partials: Partials) -> None:
        if not self._sampled:
            self._start(np.concatenate([bits for _, bits in partials]))
        elif self._found:
            self._end()
        else:
            self._count()

    def _start(self, sample: npt.NDArray[Any]) -> None:
        """A sample that is the whole answers at once; any other sets the first window."""
        self._sampled = True
        if len(sample) < self._population:
            self._search.guess(sample, self._population)
            self._count()
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

    def __init__(self, request: Top, copies: int = 1) -> None:
        super().__init__(Rank(request.calls, request.call.count - request.keep + 1), copies)
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
        blocks = run_sums(call, tile, tile.start, tile.count, self._width, self._products)
        return [_condensed(column) for column in blocks.T.tolist()]

    def absorb(self, partials: Partials) -> None:
        columns = self._width * (self._width + 1) // 2 if self._products else self._width
        sums = [math.fsum(chain.from_iterable(part[i] for _, part in partials)) for i in range(columns)]
        self.result = _symmetric(sums, self._width) if self._products else sums
        self.done = True


def _condensed(values: list[float]) -> list[float]:
    """A few numbers with exactly the same sum: each is what those before it leave, rounded."""
    found: list[float] = []
    rest = math.fsum(values)
    while rest and math.isfinite(rest):
        found.append(rest)
        rest = math.fsum([*values, *(-each for each in found)])
    return found if rest == 0 else [rest]


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

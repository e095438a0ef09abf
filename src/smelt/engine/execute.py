"""Reduce, then map: run methods over tiles on a pool of threads.

One coordinator (the calling thread) moves each tensor from pass to pass; the pool's threads read tiles,
compute and write. Kernels, file reads and writes all release the interpreter's lock, so reading, computing
and writing overlap. A few tensors are in flight, so that a thread that has nothing to do in one finds work
in the next. No result depends on the order in which tiles finish.
"""

from __future__ import annotations

import os
import queue
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any

import numpy as np

from ..kernels.blas import give_back
from ..kernels.dtypes import DTYPES
from ..kernels.program import Bits, ByRow, Call, Copy, Number, Operand, Output, Whole, row_length
from .device import Mapper
from .jobs import Job, Sink, Steps
from .progress import Progress, Silent
from .quota import Quotas
from .reduce import Reducer, reducers_for
from .tiles import TILE, BufferPool, Tile, rows_of, tiles_of
from .whole import run_rows, run_whole

#: Tiles per thread that are handed out at a time: enough while the coordinator is busy.
_FLYING = 16

#: Bytes of results that may wait in the sink where no budget says.
_AHEAD = 1 << 28

#: Of a matrix that holds more bytes the memory goes back to the system, for whichever thread is next.
_LARGE = 1 << 24

Task = Callable[[Tile], Any]


@dataclass(eq=False)
class _Live:
    """A job in flight."""

    job: Job
    tiles: list[Tile]
    steps: Steps | None = None
    reducers: list[Reducer] = field(default_factory=list)
    partials: dict[int, Any] = field(default_factory=dict)
    quotas: Quotas = field(default_factory=Quotas)
    width: int = 0  # bytes per element that its tiles write
    pending: int = 0
    after: Callable[[], None] = lambda: None


@dataclass(eq=False)
class _Waiting:
    """A matrix that is run when there is room for what it needs."""

    live: _Live
    needed: int
    task: Task
    after: Callable[[], None]


class Executor:
    """Runs jobs on ``threads`` threads, each holding one tile at a time, or a matrix.

    Matrices whose functions hold more than ``memory`` bytes together wait for each other, the largest go first;
    one always runs. What a survey makes of a tensor as a whole holds what ``needs`` tells of its first operand.
    No tile is begun whose result would wait in the sink beside ``ahead`` bytes.
    """

    def __init__(
        self, sink: Sink, mapper: Mapper, *, threads: int, memory: float = inf, ahead: float = _AHEAD,
        needs: Callable[[Operand], int] = lambda operand: 0, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self._sink = sink
        self._mapper = mapper
        self._threads = threads
        self._memory = memory
        self._ahead = ahead
        self._needs = needs
        self._queue: deque[tuple[_Live, int, Task]] = deque()
        self._flying = 0
        self._making = 0
        self._waiting: list[_Waiting] = []
        self._held: list[int] = []
        self._most_live = 2 * threads + 2
        self._progress = progress or Silent()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="smelt")
        self._buffers = BufferPool()
        self._done: queue.SimpleQueue[tuple[_Live, int, Any, BaseException | None]] = queue.SimpleQueue()
        self._live: set[_Live] = set()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    # --- jobs -------------------------------------------------------------------------------------------

    def run(self, jobs: Iterable[Job]) -> None:
        """Make every job's tensor. The first error stops the run and is raised."""
        waiting = deque(jobs)
        while waiting or self._live:
            while waiting and self._started < self._most_live:
                self._start(waiting.popleft())
            self._start_waiting()
            if self._live:
                self._collect()

    @property
    def _started(self) -> int:
        """Jobs in flight that hold something: a matrix that waits holds nothing but what a pass has found for it."""
        return len(self._live) - sum(each.live.steps is None for each in self._waiting)

    def _start_waiting(self) -> None:
        """Submit matrices, the largest that fits first: no more than there are threads, so that what runs is known."""
        for each in sorted(self._waiting, key=lambda each: -each.needed):
            fits = len(self._held) < self._threads and sum(self._held) + each.needed <= self._memory
            if fits or not self._held:
                self._waiting.remove(each)
                self._held.append(each.needed)
                self._submit(each.live, each.task, partial(self._let_go, each))

    def _let_go(self, held: _Waiting) -> None:
        if held.needed > _LARGE:
            give_back()
        self._held.remove(held.needed)
        held.after()

    def _start(self, job: Job) -> None:
        if not job.count:
            self._sink.finish(job.name)
            return
        begun = job.begin()
        live = _Live(job, [])
        self._live.add(live)
        if isinstance(begun, Generator):
            live.steps = begun
            self._advance(live)
        else:
            self._finish(live, begun)

    def _advance(self, live: _Live) -> None:
        """Send the finished statistics to the method until it needs another pass, or ends."""
        assert live.steps is not None
        while all(reducer.done for reducer in live.reducers):
            results = [reducer.result for reducer in live.reducers]
            try:
                requests = live.steps.send(results if live.reducers or live.partials else None)  # type: ignore[arg-type]
            except StopIteration as end:
                self._finish(live, end.value)
                return
            live.reducers = reducers_for(requests, self._threads)
            live.partials = {-1: None}
        waiting = [reducer for reducer in live.reducers if not reducer.done]
        row = _row(waiting[0])
        active = [reducer for reducer in waiting if _row(reducer) == row]
        live.tiles = self._tiles(live.job.count, row)
        pairs = [(reducer, reducer.calls[0]) for reducer in active]
        self._submit(live, _pass_over(pairs, live.quotas), self._absorb(live, active))

    def _tiles(self, count: int, row: int | None) -> list[Tile]:
        return tiles_of(count, self._buffers) if row is None else rows_of(count, row, self._buffers)

    def _absorb(self, live: _Live, active: Sequence[Reducer]) -> Callable[[], None]:
        def after() -> None:
            ordered = sorted(live.partials.items())
            for position, reducer in enumerate(active):
                reducer.absorb([(index, parts[position]) for index, parts in ordered])
            self._advance(live)

        return after

    def _finish(self, live: _Live, output: Output) -> None:
        """The map pass: compute and write."""
        job = live.job
        if isinstance(output, Whole) and output.by_rows:
            live.tiles = self._tiles(job.count, row_length(job.inputs[0].shape))
            live.width = DTYPES[job.dtype].bits // 8
            self._submit(live, self._rows(job, output), self._end(live))
        elif isinstance(output, Whole):
            live.tiles = [Tile(0, job.count, self._buffers)]
            self._waiting.append(_Waiting(live, job.memory, self._whole(job, output), self._end(live)))
        elif isinstance(output, Number):
            live.tiles = [Tile(0, 1, self._buffers)]
            self._submit(live, lambda tile: self._write_number(job, output.value), self._end(live))
        else:
            live.tiles = self._tiles(job.count, output.row if isinstance(output, Call) else None)
            live.width, quotas = DTYPES[job.dtype].bits // 8, live.quotas
            task = self._pack(job, output, quotas) if isinstance(output, Bits) else self._map(job, output, quotas)
            self._submit(live, task, self._end(live))

    def _map(self, job: Job, output: Call | Copy, quotas: Quotas) -> Task:
        def task(tile: Tile) -> None:
            out = self._buffers.take(tile.count, job.dtype)
            made = quotas.resolved(output, tile) if isinstance(output, Call) else output
            self._mapper(job.name, made, job.dtype, tile, out)
            self._sink.write(job.name, tile.start, out, lambda: self._buffers.give(out))
            self._progress.advance(out.nbytes)

        return task

    def _rows(self, job: Job, output: Whole) -> Task:
        def task(tile: Tile) -> None:
            run_rows(output, job, tile, self._sink, self._buffers)
            self._progress.advance(tile.count * DTYPES[job.dtype].bits // 8)

        return task

    def _whole(self, job: Job, output: Whole) -> Task:
        def task(tile: Tile) -> None:
            run_whole(output, job, tile, self._mapper, self._sink, self._buffers)
            self._progress.advance(tile.count * DTYPES[job.dtype].bits // 8)

        return task

    def _pack(self, job: Job, output: Bits, quotas: Quotas) -> Task:
        """As :meth:`_map`, eight elements to a byte; a tile is a multiple of eight."""

        def task(tile: Tile) -> None:
            values = self._buffers.take(tile.count, "F32")
            self._mapper(job.name, quotas.resolved(output.call, tile), "F32", tile, values)
            packed = np.packbits(values != 0)
            self._buffers.give(values)
            self._sink.write(job.name, tile.start // 8, packed, lambda: None)
            self._progress.advance(packed.nbytes)

        return task

    def _write_number(self, job: Job, value: float) -> None:
        self._sink.write(job.name, 0, np.array([value], np.float32), lambda: None)

    def _end(self, live: _Live) -> Callable[[], None]:
        def after() -> None:
            self._sink.finish(live.job.name)
            self._live.discard(live)

        return after

    # --- tiles ------------------------------------------------------------------------------------------

    def _submit(self, live: _Live, task: Task, after: Callable[[], None]) -> None:
        """Run ``task`` on each tile, then ``after`` on the coordinator."""
        live.partials, live.pending, live.after = {}, len(live.tiles), after
        if not live.tiles:
            after()
        self._queue.extend((live, index, task) for index in range(len(live.tiles)))
        self._hand_out()

    def _hand_out(self) -> None:
        """Give the pool tiles in order: enough to do, and no more results than the sink may hold."""
        while self._queue and self._flying < _FLYING * self._threads:
            live, index, task = self._queue[0]
            made = live.tiles[index].count * live.width
            if made and self._flying and self._sink.waiting + self._making + made > self._ahead:
                return
            self._queue.popleft()
            self._flying, self._making = self._flying + 1, self._making + made
            self._pool.submit(self._run, live, index, live.tiles[index], task)

    def _run(self, live: _Live, index: int, tile: Tile, task: Task) -> None:
        """Runs on a thread of the pool; never raises."""
        try:
            result = task(tile)
            tile.release()
            self._progress.advance(tile.bytes_read)
            tile.bytes_read = 0
            self._done.put((live, index, result, None))
        except BaseException as error:
            self._done.put((live, index, None, error))
            live.quotas.abort()

    def _collect(self) -> None:
        """Take one finished tile; move its tensor on when it was the last of the pass."""
        live, index, result, error = self._done.get()
        if error is not None:
            raise error
        self._flying, self._making = self._flying - 1, self._making - live.tiles[index].count * live.width
        self._hand_out()
        live.partials[index] = result
        live.pending -= 1
        if not live.pending:
            live.after()

    # --- whole-model statistics -------------------------------------------------------------------------

    def survey(self, steps: Steps) -> Any:
        """Run a coroutine whose requests span many tensors; returns what it returns."""
        results: list[Any] | None = None
        while True:
            try:
                requests = steps.send(results)  # type: ignore[arg-type]
            except StopIteration as end:
                return end.value
            reducers = reducers_for(requests, self._threads)
            while active := [reducer for reducer in reducers if not reducer.done]:
                self._survey_pass(active)
            results = [reducer.result for reducer in reducers]

    def _survey_pass(self, active: Sequence[Reducer]) -> None:
        """One pass over every call of the reducers; calls on the same operand share its tiles."""
        groups: dict[tuple[int, int | None], list[tuple[Reducer, Call]]] = {}
        for reducer in active:
            for call in reducer.calls:
                groups.setdefault((id(call.operands()[0]), reducer.row(call)), []).append((reducer, call))
        lives = [self._survey_group(pairs) for pairs in groups.values()]
        while any(live.pending for live in lives):
            self._start_waiting()
            self._collect()
        found = _partials(lives, groups.values())
        for reducer in active:
            reducer.absorb(found[id(reducer)])

    def _survey_group(self, pairs: list[tuple[Reducer, Call]]) -> _Live:
        reducer, call = pairs[0]
        job = Job("", "F32", call.count, call.operands(), lambda: call)
        live = _Live(job, self._tiles(job.count, reducer.row(call)))
        task = _pass_over(pairs, live.quotas)
        needed = self._needs(_first_read(call)) if reducer.row(call) == job.count else 0
        if needed:
            live.pending = len(live.tiles)
            self._waiting.append(_Waiting(live, needed, task, lambda: None))
        else:
            self._submit(live, task, lambda: None)
        return live


def _first_read(call: Call) -> Operand:
    """The first operand that is not computed from others."""
    operand = call.operands()[0]
    return _first_read(operand.call) if isinstance(operand, ByRow) else operand


def _row(reducer: Reducer) -> int | None:
    """Elements per row where a tensor's own request wants tiles of whole rows."""
    return reducer.row(reducer.calls[0])


def _pass_over(pairs: Sequence[tuple[Reducer, Call]], quotas: Quotas) -> Task:
    """The partial results of one tile, in the order of ``pairs``; each tile begins with another of them."""

    def task(tile: Tile) -> list[Any]:
        turn = tile.start // TILE % len(pairs)
        found = [reducer.tile(quotas.resolved(call, tile), tile) for reducer, call in (*pairs[turn:], *pairs[:turn])]
        return [*found[len(pairs) - turn :], *found[: len(pairs) - turn]]

    return task


def _partials(lives: Iterable[_Live], groups: Iterable[list[tuple[Reducer, Call]]]) -> dict[int, list[tuple[int, Any]]]:
    """Everything each reducer (by its id) got in a pass, tensor by tensor and tile by tile."""
    found: dict[int, list[tuple[int, Any]]] = defaultdict(list)
    for live, pairs in zip(lives, groups, strict=True):
        ordered = sorted(live.partials.items())
        for position, (owner, _) in enumerate(pairs):
            found[id(owner)] += [(index, parts[position]) for index, parts in ordered]
    return found


def usable_cores() -> int:
    """The number of processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


__all__ = ["TILE", "Executor", "Job", "Sink", "usable_cores"]

"""Merges keep to their budget: a few, and what bounds them. ``python -m tests.memory`` measures every method."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import smelt
from smelt.engine.device import mapper_for
from smelt.engine.execute import TILE, Executor
from smelt.engine.jobs import Job
from smelt.engine.reduce import SumReducer, copies_of, counters, reducers_for
from smelt.engine.tiles import BufferPool, tiles_of
from smelt.kernels.program import Copy, Rank, Totals, call
from smelt.methods.tensors import identity
from tests.memory import Models, measured, merge_of
from tests.test_kernels import Memory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models.make(tmp_path_factory.mktemp("memory") / "models", 768)


@pytest.mark.parametrize(("method", "threads"), [("breadcrumbs", 4), ("tsv", 2)])
def test_a_merge_keeps_to_the_least_budget(method: str, threads: int, models: Models, tmp_path: Path) -> None:
    """Half as much again gives the same bytes, a mebibyte less is refused."""
    chosen = smelt.methods.get(method)
    command = merge_of(models.tree(chosen, chosen.variants[0]), tmp_path)
    found = measured(method, command, threads, 0, tmp_path / "out")
    assert not found.is_bad, found


class _Slow:
    """A sink that hashes its first array when no other has come for a while: all others wait for it."""

    def __init__(self) -> None:
        self.waiting = self.most = 0
        self._hashed = False
        self._came = threading.Condition()

    def write(self, name: str, start: int, array: npt.NDArray[Any], release: Callable[[], None]) -> None:
        with self._came:
            self.waiting += 0 if self._hashed else array.nbytes
            self.most = max(self.most, self.waiting)
            self._came.notify_all()
            while start == 0 and self._came.wait(0.2):
                pass
            if start == 0:
                self._hashed, self.waiting = True, 0
        release()

    def finish(self, name: str) -> None:
        pass


@pytest.mark.parametrize("ahead", [4, 12])
def test_no_more_results_wait_than_there_is_room_for(ahead: int) -> None:
    operand = Memory(np.ones(40 * TILE, np.float32), "F32")
    sink, room = _Slow(), 4 * TILE * ahead
    with Executor(sink, mapper_for("cpu", "error", print), threads=2, ahead=room) as executor:
        executor.run([Job("x", "F32", operand.count, [operand], lambda: Copy(operand))])
    assert room / 2 < sink.most <= room


def test_searches_share_their_counters() -> None:
    """As many as there are threads, not as many for each search."""
    assert [copies_of(ranks, 8) for ranks in (1, 3, 8, 50)] == [8, 3, 1, 1]
    assert counters(16, 8) <= 2 * counters(16, 1)


def test_many_threads_find_what_one_finds() -> None:
    """Each of the searches at the tiles in another order, with fewer counters than threads."""
    values = np.random.default_rng(0).standard_normal(3 * TILE + 5).astype(np.float32)
    operand, ordered = Memory(values, "F32"), np.sort(np.abs(values))
    ranks = [int(share * values.size) for share in (0.1, 0.5, 0.9)]
    reducers = reducers_for([Rank((call(identity, x=operand),), rank) for rank in ranks], threads=4)
    tiles = tiles_of(values.size, BufferPool())

    def visit(index: int) -> None:
        for reducer in (*reducers[index % 3 :], *reducers[: index % 3]):
            found[id(reducer)].append((index, reducer.tile(reducer.calls[0], tiles[index])))

    while not all(reducer.done for reducer in reducers):
        found: dict[int, list[Any]] = {id(reducer): [] for reducer in reducers}
        workers = [threading.Thread(target=visit, args=(index,)) for index in range(len(tiles))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for reducer in reducers:
            reducer.absorb(sorted(found[id(reducer)], key=lambda each: each[0]))
    assert [reducer.result for reducer in reducers] == [ordered[rank - 1] for rank in ranks]


def test_sums_hold_a_few_numbers_per_tile_and_stay_exact() -> None:
    """Of 128 blocks: values that cancel but for the last bits."""
    values = np.random.default_rng(1).standard_normal(TILE)
    values = np.concatenate([values, -values, [2.0**-60]])
    operand = Memory(values, "F64")
    reducer = SumReducer(Totals((call(in_one, x=operand),)))
    parts = [(i, reducer.tile(reducer.calls[0], tile)) for i, tile in enumerate(tiles_of(values.size, BufferPool()))]
    assert all(len(column) < 5 for _, part in parts for column in part)
    reducer.absorb(parts)
    assert reducer.result == [2.0**-60]


def in_one(x: Any) -> Any:
    return (x,)

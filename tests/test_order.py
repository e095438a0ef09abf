"""The counting search equals sorting, for every rank, window and chunking."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.engine.jobs import Steps
from smelt.engine.reduce import RankReducer, TopReducer
from smelt.engine.tiles import BufferPool, Tile
from smelt.errors import OperationFailed
from smelt.kernels.launch import run_count
from smelt.kernels.order import RankSearch
from smelt.kernels.program import Quota, Rank, Top, Totals, call
from smelt.kernels.vocabulary import where
from smelt.methods.tensors import delta

from .running import run
from .test_kernels import Memory, identity, operand


def search(values: Any, rank: int, guess: tuple[int, int] | None = None, chunks: int = 1) -> float:
    """Run a RankSearch over ``values`` in chunks, from any first window."""
    work = RankSearch(rank)
    if guess:
        work.low, work.high = guess
    parts = [part for part in np.array_split(values, chunks) if part.size]
    for _ in range(8):
        counts, below = np.zeros(work.bins, np.uint32), 0
        for part in parts:
            source = Memory(np.ascontiguousarray(part), "F32")
            below += run_count(call(identity, x=source), lambda o: o.stored, 0, part.size, work.low, work.width, counts)
        if work.absorb(below, counts):
            return work.value
    raise AssertionError("the search did not end")


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1e-45, 0.5, -0.5, 1.0, 3.0, np.inf, 1e-3, -1e-3]), min_size=1, max_size=60
    ),
    data=st.data(),
)
def test_any_rank_with_ties_and_any_guess(values: list[float], data: st.DataObject) -> None:
    array = np.array(values, np.float32)
    rank = data.draw(st.integers(1, len(values)))
    low = data.draw(st.integers(0, 2**31 - 2))
    high = data.draw(st.integers(low + 1, 2**31))
    wanted = np.sort(np.abs(array))[rank - 1]
    assert search(array, rank) == wanted
    assert search(array, rank, (low, high), chunks=3) == wanted


def test_a_guess_from_a_sample_is_exact_even_when_biased() -> None:
    rng = np.random.default_rng(0)
    values = np.sort(np.abs(rng.standard_t(4, 50_000))).astype(np.float32)
    work = RankSearch(40_000)
    work.guess(values[:1000].view(np.uint32).astype(np.uint64), values.size)
    assert search(values, 40_000, (work.low, work.high)) == values[39_999]


def finish(reducer: Any, tiles: list[Tile]) -> Any:
    for _ in range(12):
        if reducer.done:
            return reducer.result
        reducer.absorb([(i, reducer.tile(reducer.calls[0], tile)) for i, tile in enumerate(tiles)])
    raise AssertionError("the reducer did not end")


@pytest.mark.parametrize("code", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("size", [1, 50, 5000, 600_000])
def test_rank_reducer_equals_sorting(code: str, size: int) -> None:
    rng = np.random.default_rng(size)
    base = operand(rng.normal(0, 0.02, size), code)
    model = operand(base.values().astype(np.float64) + 1e-3 * rng.standard_t(4, size), code)
    wide = np.float64 if code == "F64" else np.float32
    magnitudes = np.sort(np.abs(model.values().astype(wide) - base.values().astype(wide)))
    pool = BufferPool()
    for rank in {1, max(1, size // 5), size}:
        tiles = [Tile(start, min(1 << 19, size - start), pool) for start in range(0, size, 1 << 19)]
        assert finish(RankReducer(Rank((call(delta, base=base, model=model),), rank)), tiles) == magnitudes[rank - 1]


def test_nan_ranks_above_all_numbers() -> None:
    """Where it decides what is kept the bar is infinite; the output's pass says where the NaN is."""
    values = np.ones(1_000_000, np.float32)
    values[777_777] = np.nan
    work = (call(identity, x=Memory(values, "F32")),)
    pool = BufferPool()
    tiles = [Tile(start, min(1 << 19, values.size - start), pool) for start in range(0, values.size, 1 << 19)]
    found = [finish(RankReducer(Rank(work, rank)), tiles) for rank in (10, values.size - 1, values.size)]
    assert found == [1.0, 1.0, np.inf]
    assert finish(TopReducer(Top(work[0], 1)), tiles) == np.inf


@pytest.mark.parametrize("code", ["BF16", "F32", "F64"])
@pytest.mark.parametrize(("threads", "last"), [(1, False), (3, False), (3, True)])
def test_top_keeps_exactly_so_many_lowest_index_first_or_last(code: str, threads: int, last: bool) -> None:
    """Four tiles, and many equal magnitudes wherever the bar falls."""
    values = np.random.default_rng(5).integers(-3, 4, 2_000_000).astype(np.float64)
    order = np.lexsort((np.arange(values.size) * (-1 if last else 1), -np.abs(values)))
    for keep in (1, 7, 300_000, 900_000, 1_999_999, 2_000_000):
        kept = run(partial(top, keep=keep, last=last), operand(values, code), threads)
        assert np.array_equal(np.flatnonzero(kept), np.sort(order[:keep]))


def top(x: Any, keep: int, last: bool) -> Steps:
    (bar,) = yield (Top(call(identity, x=x), keep, last),)
    (count,) = yield (Totals((call(passing_one, x=x, bar=bar),)),)
    assert count == [keep]
    return call(passing, x=x, bar=bar)


def passing(x: Any, bar: Any) -> Any:
    return where(abs(x) >= bar, 1, 0)


def passing_one(x: Any, bar: Any) -> Any:
    return (passing(x, bar),)


def test_a_failing_tile_lets_no_other_wait() -> None:
    values = np.zeros(3_000_000, np.float32)
    values[10] = np.nan
    with pytest.raises(OperationFailed, match="NaN or Inf"):
        run(top_half, Memory(values, "F32"), 3)


def top_half(x: Any) -> Steps:
    (bar,) = yield (Top(call(identity, x=x), 1_500_000),)
    assert isinstance(bar, Quota)
    return call(passing, x=x, bar=bar)

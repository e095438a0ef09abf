"""Methods that thin task vectors by magnitude, against sorting; and the small ones that came with mergekit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import smelt
from smelt.errors import UsageError
from smelt.kernels import random
from smelt.methods.ranks import ranks

from .recipes import Family, recipe
from .tensors import BASE, X, Y, bits

Array = npt.NDArray[Any]


def merged(method: str, models: list[Array], base: Array | None = None, seed: int = 0, **parameters: Any) -> Array:
    """The merge of one tensor, by default onto zeros: what it becomes is the merged task vector."""
    start = np.zeros_like(models[0]) if base is None else base
    out = smelt.merge_tensors(method, [{"w": x} for x in models], {"w": start}, parameters=parameters, seed=seed)
    return np.asarray(out["w"])


def grid(shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
    """Few different magnitudes and no zero."""
    drawn = np.random.default_rng(3)
    return np.asarray(drawn.integers(1, 6, shape) * drawn.choice([-1, 1], shape)).astype(dtype)


def positions(values: Array) -> Array:
    """Where each magnitude comes in an ascending stable sort of the last axis."""
    return np.argsort(np.argsort(np.abs(np.float32(values)), axis=-1, kind="stable"), axis=-1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ranks_are_those_of_a_stable_sort(dtype: Any) -> None:
    values = np.random.default_rng(0).integers(-4, 5, (3, 50, 70)).astype(dtype)
    values[values == 0] *= np.random.default_rng(1).choice([-1, 1], (values == 0).sum())
    for view in (values, values.swapaxes(1, 2)):
        assert np.array_equal(ranks(view), positions(view))


# --- breadcrumbs ----------------------------------------------------------------------------------------

BANDS = {
    "remove_then_keep": lambda n, kept, removed: (max(0, n - removed - kept), n - removed),
    "keep_then_remove": lambda n, kept, removed: (n - kept, n - removed),
    "mergekit": lambda n, kept, removed: (max(0, n - removed - kept), max(0, n - removed - kept) + kept),
}


@pytest.mark.parametrize("rule", BANDS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("share", [(0.3, 0.1), (0.9, 0.4), (0.1, 0.2), (0.5, 0.0), (0.0, 0.1)])
def test_breadcrumbs_keeps_exactly_the_band(rule: str, dtype: Any, share: tuple[float, float]) -> None:
    """Over several tiles, with equal magnitudes at both ends."""
    x = grid((1100, 1000), dtype)
    density, gamma = share
    flavour = {"variant": "mergekit", "weight": 1.0} if rule == "mergekit" else {"order": rule}
    out = merged("breadcrumbs", [x], density=density, gamma=gamma, **{"lambda": 1.0}, **flavour)
    first, end = BANDS[rule](x.size, int(density * x.size), int(gamma * x.size))
    at = positions(x.reshape(-1)).reshape(x.shape)
    assert np.array_equal(out, np.where((at >= first) & (at < end), x, np.zeros_like(x)))


@pytest.mark.parametrize("rule", ["remove_then_keep", "keep_then_remove"])
@pytest.mark.parametrize("shape", [(900, 700), (11,), (4, 5, 60), (1,)])
def test_breadcrumbs_by_rows(rule: str, shape: tuple[int, ...]) -> None:
    x = grid(shape)
    out = merged("breadcrumbs", [x], density=0.5, gamma=0.1, scope="row", order=rule, **{"lambda": 1.0})
    length = shape[-1]
    first, end = BANDS[rule](length, int(0.5 * length), int(0.1 * length))
    assert np.array_equal(out, np.where((positions(x) >= first) & (positions(x) < end), x, 0))


def test_breadcrumbs_of_a_row_leaves_scalars_whole() -> None:
    out = smelt.merge_tensors("breadcrumbs", [X], BASE, parameters={"lambda": 1.0, "scope": "row"})
    assert out["scalar"] == pytest.approx(X["scalar"], abs=1e-7)


def test_breadcrumbs_of_one_tensor_is_ties_without_outliers() -> None:
    """With gamma 0 both keep the largest share; the election is the same."""
    plain = {"variant": "mergekit", "weight": 0.6, "density": 0.4, "normalize": True}
    crumbs = smelt.merge_tensors("breadcrumbs_ties", [X, Y], BASE, parameters={**plain, "gamma": 0.0})
    ties = smelt.merge_tensors("ties", [X, Y], BASE, parameters=plain)
    assert bits({"matrix": crumbs["matrix"]}) == bits({"matrix": ties["matrix"]})


# --- della ----------------------------------------------------------------------------------------------


def chances(x: Array, density: float, epsilon: float) -> Array:
    share = positions(x) / (x.shape[-1] - 1)
    return (density - epsilon + 2 * epsilon * share).astype(np.float32)


@pytest.mark.parametrize(("shape", "sampling"), [((900, 700), "rank"), ((7,), "rank"), ((900, 700), "tensor_rank")])
def test_della_draws_by_rank_whatever_the_tiles(shape: tuple[int, ...], sampling: str) -> None:
    """The very elements that the definition names, with the draws of the generator."""
    x = grid(shape)
    out = merged("della_linear", [x], seed=5, density=0.5, epsilon=0.3, sampling=sampling)
    p = chances(x if sampling == "rank" else x.reshape(-1), 0.5, 0.3).reshape(shape)
    words = random.words(random.key_of(5, "w", 0), 0, x.size).reshape(shape)
    kept = words >= (1 - p.astype(np.float64)) * 2.0**32
    assert np.array_equal(out, np.where(kept, np.float32(1) / p * x, 0).astype(np.float32))


def test_della_keeps_by_rank_and_is_right_on_average() -> None:
    x = np.random.default_rng(2).permuted(np.tile(np.arange(1, 9, dtype=np.float32), (20_000, 1)), axis=1)
    out = merged("della", [x], density=0.6, epsilon=0.3)
    for size in range(1, 9):
        p = 0.3 + 0.6 * (size - 1) / 7
        values = out[x == size]
        assert abs((values != 0).mean() - p) < 5 * np.sqrt(p * (1 - p) / values.size)
        assert abs(values.mean() / size - 1) < 5 * np.sqrt((1 - p) / p / values.size)


def test_della_as_in_mergekit_matches_the_norm_and_ranks_along_axis_one() -> None:
    x = np.random.default_rng(2).permuted(np.tile(np.arange(1, 9, dtype=np.float32), (5000, 2, 1)), axis=2)
    x = np.ascontiguousarray(x.swapaxes(1, 2))
    out = merged("della", [x], variant="mergekit", weight=1.0, density=0.6, epsilon=0.3)
    assert np.abs(out).sum(dtype=np.float64) == pytest.approx(np.abs(x).sum(dtype=np.float64), rel=1e-6)
    for size in range(1, 9):
        p = 0.3 + 0.6 * (size - 1) / 7
        assert abs((out[x == size] != 0).mean() - p) < 5 * np.sqrt(p * (1 - p) / (x == size).sum())


def test_della_gives_rows_of_one_the_density() -> None:
    kept = merged("della_linear", [np.ones((20_000, 1), np.float32)], density=0.4, epsilon=0.3)
    assert abs((kept != 0).mean() - 0.4) < 5 * np.sqrt(0.24 / kept.size)
    assert set(np.unique(kept)) == {0, np.float32(1) / np.float32(0.4)}


def test_della_of_the_top_is_not_random() -> None:
    x = grid((30, 41))
    outs = [merged("della_linear", [x], seed=seed, density=0.3, sampling="top") for seed in (0, 1)]
    assert np.array_equal(outs[0], outs[1])
    assert np.array_equal(outs[0], np.where(positions(x) >= 41 - 12, x, 0))


def test_della_that_drops_nothing_is_task_arithmetic() -> None:
    plain = smelt.merge_tensors("task_arithmetic", [X, Y], BASE, parameters={"weight": 0.4})
    whole = {"weight": 0.4, "density": 1.0, "normalize": False}
    assert bits(smelt.merge_tensors("della_linear", [X, Y], BASE, parameters=whole)) == bits(plain)


def test_one_model_may_be_whole_beside_a_thinned_one() -> None:
    x, y = grid((50, 40)), grid((50, 40))[::-1].copy()
    both = smelt.merge_tensors(
        "della_linear", [{"w": x}, {"w": y}], {"w": np.zeros_like(x)}, parameters={"normalize": False},
        per_model={"density": [1.0, 0.5]}, seed=4,
    )["w"]  # fmt: skip
    second = smelt.merge_tensors(
        "della_linear", [{"w": 0 * x}, {"w": y}], {"w": np.zeros_like(x)}, parameters={"normalize": False},
        per_model={"density": [1.0, 0.5]}, seed=4,
    )["w"]  # fmt: skip
    assert np.allclose(both - second, x, atol=1e-5)


def test_sorting_whole_tensors_is_planned_for(family: Family) -> None:
    needed = [
        smelt.plan(recipe("della", family.models[:2], family.base, parameters={"sampling": rule})).peak_memory
        for rule in ("rank", "tensor_rank")
    ]
    assert needed[0] < needed[1]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"density": 0.9, "epsilon": 0.2}, r"density 0.9 with epsilon 0.2 gives keep probabilities 0.7 to 1.1.*lower"),
        ({"density": 0.1, "epsilon": 0.1}, r"gives keep probabilities 0 to 0.2, expected inside \(0, 1\)"),
        ({"sampling": "top", "epsilon": 0.1}, "epsilon has no effect with sampling: top"),
        ({"variant": "mergekit", "weight": 1, "sampling": "top"}, "sampling has no effect with variant: mergekit"),
    ],
)
def test_della_refuses(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        smelt.merge_tensors("della", [X], BASE, parameters=parameters)


# --- arcee fusion, nearswap, ram ------------------------------------------------------------------------


def test_arcee_fusion_takes_what_stands_out() -> None:
    """Over several tiles; the quantiles are those of sorting."""
    drawn = np.random.default_rng(8)
    base = drawn.standard_normal((900, 700)).astype(np.float32)
    model = (base + 0.05 * drawn.standard_t(3, base.shape)).astype(np.float32)
    p, q = (np.exp(np.float64(x)) / np.exp(np.float64(x)).sum(axis=1, keepdims=True) + 1e-8 for x in (model, base))
    score = np.abs(model - base) * (p * np.log(p / q)).sum(axis=1, keepdims=True).astype(np.float32)
    low, median, high = (np.sort(score, axis=None)[int(share * (score.size - 1))] for share in (0.25, 0.5, 0.75))
    wanted = np.where(score >= median + 1.5 * (high - low), model, base)
    out = merged("arcee_fusion", [model], base)
    assert 0.001 < (out == model).mean() < 0.3
    assert (out != wanted).mean() < 1e-5  # what lies at the threshold may differ by a rounding


def test_nearswap_moves_by_at_most_t() -> None:
    out = smelt.merge_tensors("nearswap", [X], BASE, parameters={"t": 0.05})
    for name, base in BASE.items():
        near = np.abs(X[name] - base) < 0.0499
        assert (np.abs(out[name] - base) <= 0.05 + 1e-6).all()
        assert np.array_equal(out[name][near], X[name][near])


SPARSE = [np.array(x, np.float32) for x in ([4, 0, 2, 0, 1e-6], [0, 6, 4, 0, 3], [0, 0, 6, 0, 0])]


def test_ram_adds_what_is_unique_and_averages_what_is_shared() -> None:
    assert np.array_equal(merged("ram", SPARSE), np.array([4, 6, 4, 0, 3], np.float32))


def test_ramplus_strengthens_what_is_unique_by_the_overlap() -> None:
    """The first model shares one of two active elements, the second one of three, the third its only one."""
    out = merged("ramplus_tl", SPARSE, r=0.5, alpha=0.6)
    assert np.allclose(out, [4 * 1.3, 6 * 1.25, 4, 0, 3 * 1.25])

"""Laws of the methods that weight by given statistics: fisher, ota, ffg, aim, sens_merging."""

from __future__ import annotations

from math import ceil
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import smelt
from smelt.engine.jobs import Steps
from smelt.engine.operands import CheckpointOperand
from smelt.errors import UsageError
from smelt.kernels.program import Copy
from smelt.methods.aim import shortened
from smelt.methods.curvature import digits_of, powered
from smelt.methods.operator_norm import operator_norms
from tests.given import Given, statistics_for
from tests.running import run
from tests.small_models import Arrays
from tests.tensors import BASE, X, Y, Z, assert_close, bits

merge_tensors = smelt.merge_tensors


def given(kind: str, *models: Arrays, scale: float = 1.0) -> list[Given]:
    """Positive random numbers of several orders of magnitude."""
    found: list[Given] = []
    for seed, model in enumerate(models):
        random = np.random.default_rng(seed)
        drawn = {name: scale * np.exp(3 * random.standard_normal(array.shape)) for name, array in model.items()}
        found.append({kind: {name: np.asarray(array, np.float32) for name, array in drawn.items()}})
    return found


def scaled(statistics: Given, factor: float) -> Given:
    return {k: {n: (factor * a).astype(np.float32) for n, a in arrays.items()} for k, arrays in statistics.items()}


# --- fisher -------------------------------------------------------------------------------------------------


def test_fisher_is_the_weighted_mean() -> None:
    statistics = given("fisher", X, Y, Z)
    weights = (0.5, 0.2, 0.3)
    out = merge_tensors("fisher", [X, Y, Z], statistics=statistics, per_model={"weight": weights})
    norms = [np.sqrt(sum(float((np.float64(a) ** 2).sum()) for a in s["fisher"].values())) for s in statistics]
    for name in X:
        precisions = [
            c / norm * np.maximum(s["fisher"][name].astype(np.float64), floor)
            for c, norm, s, floor in zip(weights, norms, statistics, (1e-6, 0, 0), strict=True)
        ]
        wanted = sum(p * m[name] for p, m in zip(precisions, (X, Y, Z), strict=True)) / sum(precisions)
        np.testing.assert_allclose(out[name], wanted, rtol=0, atol=1e-6)


def test_fisher_knows_ratios_only() -> None:
    statistics = given("fisher", X, Y)
    first = merge_tensors("fisher", [X, Y], statistics=statistics, parameters={"fisher_floor": 0.0})
    heavy = merge_tensors("fisher", [X, Y], statistics=statistics, parameters={"weight": 4.0, "fisher_floor": 0.0})
    loud = [statistics[0], scaled(statistics[1], 1024.0)]
    assert bits(heavy) == bits(first)
    assert bits(merge_tensors("fisher", [X, Y], statistics=loud, parameters={"fisher_floor": 0.0})) == bits(first)


def test_fisher_takes_the_target_where_nobody_knows() -> None:
    none = {name: np.zeros_like(array) for name, array in X.items()}
    for weight in ([1.0, 1.0], [0.0, 1.0]):
        out = merge_tensors("fisher", [X, Y], statistics=[{"fisher": none}] * 2, per_model={"weight": weight})
        assert bits(out) == bits(dict(sorted(X.items())))
    mean = merge_tensors("fisher", [X, Y], statistics=[{"fisher": none}] * 2, parameters={"favor_target_model": False})
    assert_close(mean, merge_tensors("linear", [X, Y]))


@pytest.mark.parametrize(("missing", "like"), [("target", 0), ("mean", None)])
def test_fisher_of_a_tensor_without_statistics(missing: str, like: int | None) -> None:
    statistics = given("fisher", X, Y)
    for each in statistics:
        del each["fisher"]["matrix"]
    out = merge_tensors("fisher", [X, Y], statistics=statistics, parameters={"missing": missing})
    wanted = merge_tensors("linear", [X, Y]) if like is None else X
    np.testing.assert_allclose(out["matrix"], wanted["matrix"], rtol=0, atol=1e-6)


# --- ota ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 1.0, 0.25, 0.75, 1.5, 3.0, 1 / 3, 0.1])
def test_powers_are_spelt_in_binary(power: float) -> None:
    x = np.exp(np.linspace(-15, 15, 1001)).astype(np.float32)
    found = powered(x, tuple(np.float32(digit) for digit in digits_of(power)))
    np.testing.assert_allclose(found, x.astype(np.float64) ** power, rtol=5e-6)


def test_ota_of_equal_curvatures_is_the_mean() -> None:
    ones = {name: np.ones_like(array) for name, array in X.items()}
    out = merge_tensors("ota", [X, Y], BASE, statistics=[{"exp_avg_sq": ones}] * 2)
    assert_close(out, merge_tensors("linear", [X, Y]))
    none = [scaled({"exp_avg_sq": ones}, 0.0)] * 2
    assert_close(merge_tensors("ota", [X, Y], BASE, statistics=none), out)


def test_ota_knows_ratios_only() -> None:
    statistics = given("exp_avg_sq", X, Y, scale=1e-10)
    first = merge_tensors("ota", [X, Y], BASE, statistics=statistics)
    both = [scaled(each, 2.0**-20) for each in statistics]
    assert bits(merge_tensors("ota", [X, Y], BASE, statistics=both)) == bits(first)
    one = [statistics[0], scaled(statistics[1], 2.0**-10)]
    alike = [merge_tensors("ota", [X, Y], BASE, statistics=s, parameters={"normalise": "model"}) for s in (both, one)]
    assert_close(*alike)
    batch = merge_tensors("ota", [X, Y], BASE, statistics=one, per_model={"batch_size": [1.0, 1024.0]})
    assert_close(batch, first)


@pytest.mark.parametrize("how", ["precond", "linear", "ties"])
def test_ota_of_one_model_is_a_graft(how: str) -> None:
    statistics = given("exp_avg_sq", X)
    common = {"precond_threshold": 1e-3, "fallback_to_base": True, "masked_task_vector_merge_method": how}
    out = merge_tensors("ota", [X], BASE, statistics=statistics, parameters=common)
    grafted = merge_tensors(
        "ffg", [X], BASE, statistics=statistics, parameters={"select": "threshold", "threshold": 1e-3}
    )
    assert_close(out, grafted, ulps=1)
    assert any((grafted[name] == BASE[name]).any() and (grafted[name] == X[name]).any() for name in X)


def test_only_the_authors_linear_forgets_the_mask() -> None:
    statistics = given("exp_avg_sq", X, Y)
    common = {"precond_threshold": 1e-3, "masked_task_vector_merge_method": "linear", "fallback_to_base": True}
    ours, theirs = (
        merge_tensors("ota", [X, Y], BASE, statistics=statistics, parameters={**common, "variant": variant})
        for variant in ("paper", "ota-merge")
    )
    masks = [s["exp_avg_sq"]["matrix"] * (m["matrix"] - BASE["matrix"]) ** 2 >= 1e-3
             for s, m in zip(statistics, (X, Y), strict=True)]  # fmt: skip
    wanted = BASE["matrix"] + sum(
        mask * (m["matrix"] - BASE["matrix"]) / 2 for mask, m in zip(masks, (X, Y), strict=True)
    )
    np.testing.assert_allclose(ours["matrix"], wanted, atol=1e-6)
    assert (masks[0] ^ masks[1]).any()
    assert not np.allclose(theirs["matrix"], wanted, atol=1e-3)


def test_rank_one_and_truncated_curvatures() -> None:
    rows, columns = np.float32([1, 2, 4, 8]), np.float32([0.5, 1, 3])
    base = {"w": np.zeros((4, 3), np.float32)}
    models = [{"w": np.full((4, 3), value, np.float32)} for value in (1.0, 2.0)]
    flat = {"w": np.ones((4, 3), np.float32)}
    dense: list[Given] = [{"exp_avg_sq": {"w": np.outer(rows, columns)}}, {"exp_avg_sq": flat}]
    first = merge_tensors("ota", models, base, statistics=dense)
    for parameters in ({"rank1_approx": True}, {"rank": 1}):
        assert_close(merge_tensors("ota", models, base, statistics=dense, parameters=parameters), first)
    sums: Given = {
        "exp_avg_sq_row": {"w": rows * columns.sum()}, "exp_avg_sq_col": {"w": columns * rows.sum()},
    }  # fmt: skip
    assert_close(merge_tensors("ota", models, base, statistics=[sums, dense[1]]), first)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rescale": True}, "rescale needs a base model"),
        ({"fallback_to_base": True}, "fallback_to_base needs a base model"),
        ({"masked_task_vector_merge_method": "ties"}, "merge_method: ties needs a base model"),
        ({"ties_density": 0.5}, "ties_density has no effect with masked_task_vector_merge_method: precond"),
        ({"approximate_norm": True}, "approximate_norm has no effect with rescale: False"),
        ({"power": 0.0}, "power must lie in"),
    ],
)
def test_ota_refuses_what_has_no_meaning(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merge_tensors("ota", [X, Y], statistics=given("exp_avg_sq", X, Y), parameters=parameters)


@pytest.mark.parametrize("shape", [(3, 5), (90, 40), (40, 90), (300, 200), (4, 6, 30)], ids=str)
def test_operator_norms_are_exact(shape: tuple[int, ...]) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found: list[float] = []

    def method(x: Any) -> Steps:
        norms = yield from operator_norms("w", shape, [(_itself, {"x": x}), (_half, {"x": x})], 64)
        found.extend(norms)
        return Copy(x)

    run(method, CheckpointOperand(smelt.load({"w": matrix}), "w"))
    wanted = np.linalg.norm(matrix.reshape(-1, shape[-1]).astype(np.float64), 2)
    np.testing.assert_allclose(found, [wanted, wanted / 2], rtol=1e-6)


def _itself(x: Any) -> Any:
    return x


def _half(x: Any) -> Any:
    return x / 2


# --- ffg ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("density", [0.07, 0.3, 0.9])
def test_ffg_keeps_the_stated_share_and_the_largest(density: float, scope: str) -> None:
    statistics = given("exp_avg_sq", X, scale=1e-30)
    out = merge_tensors(
        "ffg", [X], BASE, statistics=statistics, parameters={"density": density, "scope": scope}, threads=3
    )
    scores = {
        n: statistics[0]["exp_avg_sq"][n].astype(np.float64) * (X[n].astype(np.float64) - BASE[n]) ** 2 for n in X
    }
    groups = [list(X)] if scope == "model" else [[name] for name in X if X[name].size]
    for names in groups:
        kept = np.concatenate([(out[n] != BASE[n]).reshape(-1) for n in names])
        score = np.concatenate([scores[n].reshape(-1) for n in names])
        assert kept.sum() == ceil(round(density * len(kept), 9))
        assert kept.all() or score[kept].min() >= score[~kept].max() * (1 - 1e-6)
    assert all(((out[n] == BASE[n]) | (out[n] == X[n])).all() for n in X)


def test_ffg_at_its_ends_gives_model_and_base() -> None:
    statistics = given("exp_avg_sq", X)
    for density, end in ((1.0, X), (0.0, BASE)):
        out = merge_tensors("ffg", [X], BASE, statistics=statistics, parameters={"density": density})
        assert bits(out) == bits(dict(sorted(end.items())))


def test_ffg_never_keeps_what_costs_nothing() -> None:
    statistics = given("exp_avg_sq", X)
    for array in statistics[0]["exp_avg_sq"].values():
        array[...] = np.where(np.arange(array.size).reshape(array.shape) % 10 < 8, 0, array)
    out = merge_tensors("ffg", [X], BASE, statistics=statistics, parameters={"density": 0.5})
    assert all(((out[n] != BASE[n]) == (statistics[0]["exp_avg_sq"][n] > 0)).all() for n in X)


def test_ffg_by_magnitude_needs_no_statistics() -> None:
    out = merge_tensors("ffg", [X], BASE, parameters={"metric": "magnitude", "density": 0.2})
    delta = np.concatenate([np.abs(X[n] - BASE[n]).reshape(-1) for n in X])
    kept = np.concatenate([(out[n] != BASE[n]).reshape(-1) for n in X])
    assert delta[kept].min() >= delta[~kept].max()


def test_a_rescaled_graft_has_the_norm_of_the_whole_change() -> None:
    statistics = given("exp_avg_sq", X)
    out = merge_tensors("ffg", [X], BASE, statistics=statistics, parameters={"rescale": "norm", "scope": "tensor"})
    for name, order in (("matrix", 2), ("row", None)):
        norms = [np.linalg.norm((m[name] - BASE[name]).astype(np.float64), order) for m in (out, X)]
        np.testing.assert_allclose(*norms, rtol=1e-5)


@pytest.mark.parametrize(("missing", "end"), [("keep", X), ("base", BASE)])
def test_ffg_of_a_tensor_without_statistics(missing: str, end: Arrays) -> None:
    statistics = given("exp_avg_sq", X)
    del statistics[0]["exp_avg_sq"]["matrix"]
    out = merge_tensors("ffg", [X], BASE, statistics=statistics, parameters={"missing": missing})
    assert (out["matrix"] == end["matrix"]).all()


# --- aim ----------------------------------------------------------------------------------------------------


def activations(**columns: Any) -> list[Given]:
    return [{"input_abs_mean": {name: np.asarray(values, np.float32) for name, values in columns.items()}}]


def test_aim_protects_active_channels() -> None:
    one_hot = np.eye(33, dtype=np.float32)[4]
    out = merge_tensors("aim", [X], BASE, statistics=activations(matrix=one_hot), parameters={"omega": 0.0})
    assert (out["matrix"][:, 4] == BASE["matrix"][:, 4]).all()
    plain = merge_tensors("task_arithmetic", [X], BASE)
    assert bits({"row": out["row"]}) == bits({"row": plain["row"]})
    np.testing.assert_array_equal(np.delete(out["matrix"], 4, 1), np.delete(plain["matrix"], 4, 1))


def test_aim_knows_ratios_only_and_may_do_nothing() -> None:
    s = np.random.default_rng(0).random(33)
    first, second = (merge_tensors("aim", [X, Y], BASE, statistics=activations(matrix=k * s)) for k in (1, 1024))
    assert bits(first) == bits(second)
    plain = merge_tensors("task_arithmetic", [X, Y], BASE)
    for dead, omega in ((s, 1.0), (0 * s, 0.0)):
        out = merge_tensors("aim", [X, Y], BASE, statistics=activations(matrix=dead), parameters={"omega": omega})
        assert bits(out) == bits(plain)


def test_aim_clips_enormous_channels() -> None:
    s = np.ones(33)
    s[0] = 1e6
    out = merge_tensors("aim", [X], BASE, statistics=activations(matrix=s), parameters={"omega": 0.0, "clip": 0.9})
    assert (out["matrix"] == BASE["matrix"]).all()


@pytest.mark.parametrize(("dtype", "dropped"), [(ml_dtypes.bfloat16, 16), (np.float16, 13)])
def test_rounding_to_short_types_in_arithmetic(dtype: Any, dropped: int) -> None:
    """Against the types' own rounding; differences of such numbers are full of ties."""
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(200_000).astype(dtype).astype(np.float32) for _ in range(2))
    splits = tuple(np.float32(2.0 ** (dropped + change) + 1) for change in (0, -1, 1))
    np.testing.assert_array_equal(shortened(a - b, splits), (a - b).astype(dtype).astype(np.float32))


# --- sens_merging -------------------------------------------------------------------------------------------


LAYERED = ["model.layers.0.a.weight", "model.layers.0.b.weight", "model.layers.1.a.weight", "lm_head.weight"]


def sensitive(*rows: list[float]) -> list[Given]:
    return [{"grad_abs_theta": dict(zip(LAYERED, map(np.float64, row), strict=True))} for row in rows]


def layered(seed: int) -> Arrays:
    return {name: np.random.default_rng([seed, len(name)]).standard_normal(50).astype(np.float32) for name in LAYERED}


def test_sens_merging_weighs_layers() -> None:
    base, first, second = (layered(seed) for seed in range(3))
    statistics = sensitive([1, 2, 4, 0], [4, 0, 3, 5])
    alphas = np.array([[3, 4, 0], [4, 3, 5]]) / np.array([[5], [np.sqrt(50)]])
    scores = np.exp(alphas * np.array([[0.75], [0.25]]) / 0.1)
    sigma = scores / scores.sum(axis=0)
    out = merge_tensors(
        "sens_merging", [first, second], base, statistics=statistics, parameters={"temperature": 0.1, "lambda": 0.5},
        per_model={"distance": [1.0, 3.0]},
    )  # fmt: skip
    for name, layer in zip(LAYERED, (0, 0, 1, 2), strict=True):
        wanted = base[name] + 0.5 * 2 * sum(
            sigma[i, layer] * (m[name] - base[name]) for i, m in enumerate((first, second))
        )
        np.testing.assert_allclose(out[name], wanted, rtol=0, atol=2e-6)


def test_sens_merging_of_equal_sensitivities_is_task_arithmetic() -> None:
    base, *models = (layered(seed) for seed in range(4))
    plain = merge_tensors("task_arithmetic", models, base, parameters={"weight": 0.4})
    for rows, temperature in (([[1, 2, 3, 4]] * 3, 1.0), ([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], 1e9)):
        out = merge_tensors("sens_merging", models, base, statistics=sensitive(*rows),
                            parameters={"temperature": temperature})  # fmt: skip
        assert_close(out, plain)


def test_statistics_reach_all_of_these_methods() -> None:
    """Without them each says so."""
    for name in ("fisher", "ota", "ffg", "aim", "sens_merging"):
        method = smelt.methods.get(name)
        models = [X] if method.max_models == 1 else [X, Y]
        assert all(statistics_for(method, {}, models))
        with pytest.raises(UsageError, match=f"{name} needs statistics"):
            merge_tensors(name, models, None if method.base == "ignored" else BASE)

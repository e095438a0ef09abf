"""Laws of the methods that project: regmean, widen, opcm, lore."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.errors import InputRejected
from smelt.methods.lore import estimated, shrunk
from smelt.methods.opcm import dominated
from tests.small_models import Arrays
from tests.tensors import BASE, X, Y, Z, assert_close, bits

merge_tensors = smelt.merge_tensors


def drawn(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- regmean ------------------------------------------------------------------------------------------------


def gram(inputs: Any) -> dict[str, Arrays]:
    return {"gram": {"w": (inputs.T @ inputs / len(inputs)).astype(np.float32)}}


def test_regmean_fits_all_outputs_best() -> None:
    models, inputs = [{"w": drawn(seed, 5, 4)} for seed in range(2)], [drawn(seed, 50, 4) for seed in (2, 3)]
    options = {"reduce_non_diagonal_ratio": 1.0}
    found = merge_tensors("regmean", models, statistics=[gram(x) for x in inputs], parameters=options)["w"]

    def error(w: Any) -> float:
        return float(sum(((x @ (w - m["w"]).T) ** 2).sum() for x, m in zip(inputs, models, strict=True)))

    assert all(error(found) < error(found + 0.01 * drawn(seed, 5, 4)) for seed in range(4, 24))


def test_regmean_of_equal_or_missing_grams_is_the_mean() -> None:
    models = [{"w": drawn(seed, 5, 4), "u": drawn(seed + 2, 3, 4), "v": drawn(seed, 3)} for seed in range(2)]
    known = gram(drawn(2, 50, 4))["gram"]["w"]
    both, one = {"gram": {"w": known, "u": known}}, {"gram": {"u": known}}
    mean = merge_tensors("linear", models)
    assert_close(merge_tensors("regmean", models, statistics=[both, both]), mean)
    assert_close(merge_tensors("regmean", models, statistics=[both, one], parameters={"missing": "mean"}), mean)
    with pytest.raises(InputRejected, match="no gram of 1 tensor"):
        merge_tensors("regmean", models, statistics=[both, one])


@pytest.mark.parametrize("ratio", [0.0, 0.9, 1.0])
def test_regmean_keeps_the_mean_of_features_never_seen(ratio: float) -> None:
    models, inputs = [{"w": drawn(seed, 5, 4)} for seed in range(2)], [drawn(seed, 2, 4) for seed in (2, 3)]
    for x in inputs:
        x[:, 1:] = 0
    options = {"reduce_non_diagonal_ratio": ratio}
    found = merge_tensors("regmean", models, statistics=[gram(x) for x in inputs], parameters=options)["w"]
    np.testing.assert_allclose(found[:, 1:], merge_tensors("linear", models)["w"][:, 1:], atol=1e-6)
    assert not np.allclose(found[:, 0], merge_tensors("linear", models)["w"][:, 0], atol=1e-3)


# --- widen --------------------------------------------------------------------------------------------------


def test_widen_of_what_all_changed_much_is_the_sum() -> None:
    """Threshold 0: every column but the lowest-ranked one of each table."""
    out = merge_tensors("widen", [X, Y], BASE, parameters={"above_average_value_ratio": 0.0})
    total = merge_tensors("task_arithmetic", [X, Y], BASE)
    apart = np.abs(out["matrix"] - total["matrix"]).max(axis=0) > 1e-6
    assert 1 <= apart.sum() <= 4


def test_widen_never_above_average_averages_models_that_changed_alike() -> None:
    out = merge_tensors("widen", [X] * 3, BASE, parameters={"above_average_value_ratio": 2.5})
    assert_close({"matrix": out["matrix"]}, {"matrix": X["matrix"]})


def test_widen_follows_its_columns_and_of_a_token_table_its_rows() -> None:
    order = np.random.default_rng(0).permutation(33)
    turned = [{"w": m["matrix"][:, order]} for m in (BASE, X, Y, Z)]
    plain = merge_tensors("widen", [{"w": m["matrix"]} for m in (X, Y, Z)], {"w": BASE["matrix"]})
    assert (merge_tensors("widen", turned[1:], turned[0])["w"] == plain["w"][:, order]).all()
    tables = [{"model.embed_tokens.weight": np.ascontiguousarray(m["matrix"].T)} for m in (BASE, X, Y, Z)]
    table = merge_tensors("widen", tables[1:], tables[0])["model.embed_tokens.weight"]
    np.testing.assert_allclose(table, plain["w"].T, atol=1e-6)


def test_widen_sees_changes_below_the_resolution_of_a_cosine() -> None:
    """A thousandth of every change has the same ranks of direction and nearly those of length."""
    base = BASE["matrix"].astype(np.float64)
    small = merge_tensors("widen", [{"w": base + 1e-6 * (m["matrix"] - base)} for m in (X, Y)], {"w": base})
    smaller = merge_tensors("widen", [{"w": base + 1e-7 * (m["matrix"] - base)} for m in (X, Y)], {"w": base})
    np.testing.assert_allclose((small["w"] - base) / 1e-6, (smaller["w"] - base) / 1e-7, atol=1e-3)


def test_widen_takes_a_convolution_as_a_matrix() -> None:
    flat = [{"w": drawn(seed, 6, 20)} for seed in range(3)]
    kernels = [{"w": m["w"].reshape(6, 5, 2, 2)} for m in flat]
    wanted = merge_tensors("widen", flat[1:], flat[0])["w"]
    assert bits({"w": merge_tensors("widen", kernels[1:], kernels[0])["w"].reshape(6, 20)}) == bits({"w": wanted})


# --- opcm ---------------------------------------------------------------------------------------------------


def norm(out: Arrays) -> float:
    return float(np.sqrt(sum(((a.astype(np.float64) - BASE[name]) ** 2).sum() for name, a in out.items())))


@pytest.mark.parametrize("options", [{}, {"alpha": 1.0}, {"alpha": 0.0, "zero_diagonal": True}])
def test_opcm_keeps_the_mean_distance_from_the_base(options: dict[str, Any]) -> None:
    models = [X, Y, {name: BASE[name] + 3 * (a - BASE[name]) for name, a in Z.items()}]
    out = merge_tensors("opcm", models, BASE, parameters=options)
    assert norm(out) == pytest.approx(sum(map(norm, models)) / 3, rel=1e-5)


def test_opcm_adds_nothing_to_what_dominates() -> None:
    total, delta = drawn(0, 9, 6).astype(np.float64), drawn(1, 9, 6).astype(np.float64)
    left, sigma, right = np.linalg.svd(total, full_matrices=False)
    for diagonal in (False, True):
        rest = left.T @ (delta - dominated(total, delta, 0.5, diagonal)) @ right.T
        count = int((np.cumsum(sigma) <= sigma.sum() / 2).sum())
        assert 0 < count < 6
        np.testing.assert_allclose(rest[:count, :count], 0, atol=1e-12)
        assert np.allclose(np.diag(rest), 0, atol=1e-12) == diagonal
        assert (np.abs(rest[count:, :count]) > 1e-6).all()


def test_opcm_at_its_ends() -> None:
    """Nothing dominates: the sum at the mean norm. One model: itself. After nothing: as the first."""
    assert bits(merge_tensors("opcm", [X], BASE)) == bits(dict(sorted(X.items())))
    plain = merge_tensors("task_arithmetic", [X, Y], BASE)
    factor = (norm(X) + norm(Y)) / 2 / norm(plain)
    wanted = {name: BASE[name] + np.float32(factor) * (a - BASE[name]) for name, a in plain.items()}
    assert_close(merge_tensors("opcm", [X, Y], BASE, parameters={"alpha": 0.0}), wanted)
    second = {**BASE, "matrix": X["matrix"]}
    out = merge_tensors("opcm", [BASE, second], BASE, parameters={"zero_diagonal": True})
    np.testing.assert_allclose(out["matrix"], (BASE["matrix"] + X["matrix"]) / 2, atol=1e-6)


# --- lore ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.1, 1e3])
def test_lore_of_two_equal_weights_is_the_mean(threshold: float) -> None:
    out = merge_tensors("lore", [X, Y], parameters={"threshold": threshold})
    assert_close(out, merge_tensors("linear", [X, Y]))


def test_lore_of_two_unequal_weights_in_closed_form() -> None:
    out = merge_tensors("lore", [X, Y], parameters={"threshold": 0.3}, per_model={"weight": [3.0, 1.0]})
    half = shrunk((X["matrix"].astype(np.float64) - Y["matrix"]) / 2, 0.3)
    np.testing.assert_allclose(out["matrix"], (X["matrix"] + Y["matrix"]) / 2 + half / 2, atol=1e-6)
    linear = merge_tensors("linear", [X, Y], per_model={"weight": [0.75, 0.25]})
    assert_close({"row": out["row"]}, {"row": linear["row"]})


def test_lore_descends_to_a_fixed_point() -> None:
    models = [drawn(seed, 12, 7).astype(np.float64) for seed in range(4)]

    def objective(rounds: int) -> float:
        base, deltas = estimated(models, 2.0, rounds)
        parts = zip(models, deltas, strict=True)
        return sum(((base + d - m) ** 2).sum() / 2 + 2.0 * np.linalg.norm(d, "nuc") for m, d in parts)

    course = [objective(rounds) for rounds in (1, 2, 5, 20, 500)]
    assert all(later <= sooner + 1e-9 for sooner, later in pairwise(course))
    assert course[-1] < course[0]
    base, deltas = estimated(models, 2.0, 500)
    np.testing.assert_allclose(sum(m - base - d for m, d in zip(models, deltas, strict=True)), 0, atol=1e-6)


def test_lore_takes_a_convolution_as_a_matrix() -> None:
    flat = [{"w": drawn(seed, 6, 20)} for seed in range(3)]
    kernels = [{"w": m["w"].reshape(6, 5, 2, 2)} for m in flat]
    whole, parts = (merge_tensors("lore", models, parameters={"threshold": 2.0})["w"] for models in (flat, kernels))
    assert (parts.reshape(6, 20) == whole).all()
    assert not np.allclose(whole, merge_tensors("linear", flat)["w"], atol=1e-3)

"""Laws of the methods that make the interference of task vectors small: wudi, doge, optmerge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from benchmarks import matrix

import smelt
from smelt.errors import UsageError
from smelt.methods.descent import adam, momentum_share
from smelt.methods.effective_rank import RULES
from smelt.methods.interference import Term, moved, quadratic, slope
from tests.small_models import Arrays, fine_tuned, llama
from tests.tensors import BASE, X, Y, Z, assert_close, bits

merge_tensors = smelt.merge_tensors

#: The minimum itself: every direction that a task vector has, solved.
EXACT = {"auto_rank_method": "none"}


def changes(shape: tuple[int, int], count: int = 3, scale: float = 1.0) -> list[Any]:
    return [scale * np.random.default_rng(seed).standard_normal(shape) for seed in range(count)]


def merged(method: str, deltas: list[Any], name: str = "matrix", **parameters: Any) -> Any:
    """The merged vector of these task vectors on a base of zeros, in fp64."""
    base = {name: np.zeros_like(deltas[0])}
    return merge_tensors(method, [{name: delta} for delta in deltas], base, parameters=parameters)[name]


def minimum(deltas: list[Any]) -> Any:
    grams = [delta.T @ delta / (delta**2).sum() for delta in deltas]
    return sum(d @ g for d, g in zip(deltas, grams, strict=True)) @ np.linalg.pinv(sum(grams), rcond=1e-10)


# --- the quadratic form ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 8), (2, 20), (7, 20)])
def test_the_slope_is_that_of_the_loss(shape: tuple[int, int]) -> None:
    """With more rows than columns, with few, and with as good as as many."""
    deltas, start = changes(shape), np.random.default_rng(8).standard_normal(shape)
    way = np.random.default_rng(9).standard_normal(shape).astype(np.float32)
    found = slope((Term(0.5, d, d) for d in deltas), 3 * shape[0], start)(way)
    wanted = sum(2 * 0.5 * (start + way - d) @ d.T @ d for d in deltas)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_momentum_at_once_is_momentum_step_by_step() -> None:
    deltas = changes((6, 9))
    form = quadratic((Term(0.1, d, d) for d in deltas), 18, (6, 9))
    start = sum(deltas)
    place, speed = start.copy(), np.zeros_like(start)
    for _ in range(40):
        speed = 0.9 * speed + sum(2 * 0.1 * (place - d) @ d.T @ d for d in deltas)
        place = place - 0.01 * speed
    spectrum = form.spectrum()
    at_once = moved(form.pull, start, spectrum, momentum_share(2 * spectrum.values, 0.01, 0.9, 40))
    np.testing.assert_allclose(at_once, place, rtol=0, atol=1e-12)


def test_adam_reaches_the_minimum_in_even_steps() -> None:
    target = np.array([[3.0, -2.0]], np.float32)
    one, many = (adam(lambda x: 2 * (x - target), (1, 2), *how) for how in ((0.01, 1), (0.05, 2000)))
    np.testing.assert_allclose(one, 0.01 * np.sign(target), rtol=1e-6)
    np.testing.assert_allclose(many, target, atol=1e-3)


# --- wudi -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 8), (3, 20), (12, 30)])
def test_wudi_without_a_filter_is_the_minimum(shape: tuple[int, int]) -> None:
    """With more rows than columns, with fewer, and with as good as as many."""
    deltas = changes(shape)
    np.testing.assert_allclose(merged("wudi", deltas, **EXACT), minimum(deltas), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("variant", ["aswudi", "iwudi", "swudi"])
def test_closed_forms_scale_with_the_task_vectors(variant: str) -> None:
    small, large = (merged("wudi", changes((12, 16), scale=scale), variant=variant) for scale in (1e-4, 1.0))
    np.testing.assert_allclose(small * 1e4, large, rtol=1e-9, atol=1e-12)


def test_time_runs_from_the_sum_to_the_minimum() -> None:
    deltas = changes((12, 16))
    start, end = (merged("wudi", deltas, variant="iwudi", exp_time=time) for time in (0.0, 1e9))
    np.testing.assert_allclose(start, sum(deltas), atol=1e-12)
    np.testing.assert_allclose(end, minimum(deltas), atol=1e-9)


def test_copies_count_once_and_strangers_are_added() -> None:
    (one,) = changes((12, 16), 1)
    left, right = one.copy(), one.copy()
    left[:, :8] = right[:, 8:] = 0
    np.testing.assert_allclose(merged("wudi", [one, one], **EXACT), one, atol=1e-12)
    np.testing.assert_allclose(merged("wudi", [left, right], **EXACT), one, atol=1e-12)


def test_a_model_that_learnt_nothing_is_left_out() -> None:
    deltas = changes((12, 16), 2)
    with_zero = merged("wudi", [*deltas, np.zeros((12, 16))])
    np.testing.assert_allclose(with_zero, merged("wudi", deltas), atol=1e-12)


def test_the_steps_of_adam_are_absolute_unless_they_are_relative() -> None:
    deltas = changes((12, 16))
    moved = merged("wudi", deltas, "layers.0.mlp.up_proj.weight", variant="wudi", iter_num=1, lr=1e-3) - sum(deltas)
    np.testing.assert_allclose(np.abs(moved), 1e-3, rtol=1e-5)
    one, other = (
        merged("wudi", changes((12, 16), scale=scale), "layers.0.mlp.up_proj.weight", variant="wudi", lr_relative=1e-3)
        for scale in (1.0, 1e-3)
    )
    np.testing.assert_allclose(other * 1e3, one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "none"])
def test_every_rule_makes_the_loss_smaller_though_not_always_least(rule: str) -> None:
    deltas = [delta * np.exp(-0.3 * np.arange(24)) for delta in changes((12, 24))]

    def loss(place: Any) -> float:
        return float(sum((((place - d) @ d.T) ** 2).sum() / (d**2).sum() for d in deltas))

    result = loss(merged("wudi", deltas, auto_rank_method=rule))
    assert loss(minimum(deltas)) <= result * (1 + 1e-9)
    assert result < loss(sum(deltas))


def test_scope_says_what_is_solved() -> None:
    base = llama(0)
    models = [fine_tuned(base, seed) for seed in (1, 2)]
    mean = merge_tensors("linear", models, per_model={"weight": [0.5, 0.5]})

    def solved(**parameters: Any) -> set[str]:
        out = merge_tensors("wudi", models, base, parameters=parameters)
        same = {n for n in out if np.allclose(out[n], mean[n], atol=1e-6) or np.array_equal(out[n], base[n])}
        return set(base) - same

    matrices = {name for name in base if base[name].ndim == 2}
    assert solved() == matrices - {"lm_head.weight"}
    assert solved(scope="linear") == matrices - {"lm_head.weight", "model.embed_tokens.weight"}
    assert solved(scope="linear", other="base", variant="wudi") == solved(scope="linear")


def test_convolutions_are_matrices_where_that_is_wished() -> None:
    deltas = [d.reshape(6, 4, 2, 2) for d in changes((6, 16))]
    flat = merged("wudi", [d.reshape(6, 16) for d in deltas])
    np.testing.assert_allclose(merged("wudi", deltas, flatten=True), flat.reshape(6, 4, 2, 2), atol=1e-15)
    np.testing.assert_allclose(merged("wudi", deltas), sum(deltas) / 3, atol=1e-15)


@pytest.mark.parametrize(("given", "said"), [
    ({"exp_time": 5.0}, "exp_time has no effect with filter_type: none"),
    ({"lr": 1e-4}, "lr has no effect with optimizer: none"),
    ({"variant": "wudi", "filter_type": "none"}, "filter_type has no effect with variant: wudi"),
    ({"rank_level": 0.5}, "rank_level has no effect with auto_rank_method: participation_sqrt"),
])  # fmt: skip
def test_wudi_refuses_knobs_that_would_do_nothing(given: Arrays, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        merge_tensors("wudi", [X, Y], BASE, parameters=given)


def test_wudi_does_not_mind_the_order_of_models() -> None:
    first, second = (merge_tensors("wudi", order, BASE) for order in ([X, Y, Z], [Z, X, Y]))
    assert_close(first, second)
    assert bits(first) != bits(BASE)


# --- doge -----------------------------------------------------------------------------------------------

#: No mask: what is merged is what descent found.
UNMASKED = {"density": 1.0, "lambda": 0.5}


def test_doge_without_steps_adds_task_vectors_of_one_norm() -> None:
    deltas = changes((12, 16))
    wanted = sum(0.5 * delta / np.linalg.norm(delta) for delta in deltas)
    np.testing.assert_allclose(merged("doge", deltas, steps=0, **UNMASKED), wanted, rtol=1e-12, atol=1e-12)


def test_doge_makes_its_loss_smaller_and_avoids_what_is_shared() -> None:
    deltas = changes((12, 16))
    factors = [0.5 / np.linalg.norm(delta) for delta in deltas]

    def loss(merged_vector: Any) -> float:
        return float(sum(((d * (d - merged_vector)).sum(axis=1) ** 2).sum() for d in deltas))

    start = sum(f * d for f, d in zip(factors, deltas, strict=True))
    losses = [loss(merged("doge", deltas, steps=steps, lr=0.1, subspace=99, **UNMASKED)) for steps in (0, 1, 2, 50)]
    assert losses[0] == pytest.approx(loss(start))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
    first = merged("doge", deltas, steps=1, lr=1e-2, subspace=1, **UNMASKED)
    np.testing.assert_allclose(first, start, atol=1e-6)


def test_normalised_doge_scales_with_the_task_vectors() -> None:
    known = {"relative": True, "normalise": True, "density": 0.4, "lambda": 0.3}
    small, large = (merged("doge", changes((12, 16), scale=scale), **known) for scale in (2.0**-12, 1.0))
    np.testing.assert_allclose(small * 2.0**12, large, rtol=1e-9, atol=1e-12)


def test_doge_masks_by_one_threshold_over_all_matrices() -> None:
    """With one matrix a hundred times as large as the other, nothing of the small one is left."""
    base = {name: np.zeros((8, 8)) for name in ("large", "small", "norm.weight")}
    models = [
        {"large": a, "small": 0.01 * a, "norm.weight": a}
        for a in (delta + np.sign(delta) for delta in changes((8, 8), 2))
    ]
    out = merge_tensors("doge", models, base, parameters={"density": 0.25, "steps": 0, "lambda": 1.0})
    assert not out["small"].any()
    assert not out["norm.weight"].any()
    assert (out["large"] != 0).sum() >= 32


# --- optmerge -------------------------------------------------------------------------------------------


def test_optmerge_of_full_rank_is_wudi() -> None:
    deltas = changes((12, 16))
    out = merged("optmerge", deltas, truncate_rank_ratio=1.0, mode="full", iter_num=20)
    np.testing.assert_allclose(out, merged("wudi", deltas, variant="wudi", iter_num=20), atol=1e-9)


@pytest.mark.parametrize(("mode", "factor"), [("full", 1.0), ("lora", 1 / 3)])
def test_optmerge_begins_at_the_sum_or_at_the_mean(mode: str, factor: float) -> None:
    deltas = changes((12, 16))
    for still in ({"lr": 0.0}, {"iter_num": 0}):
        np.testing.assert_allclose(merged("optmerge", deltas, mode=mode, **still), factor * sum(deltas), atol=1e-12)


def test_optmerge_tells_adapters_from_their_rank() -> None:
    full = changes((12, 16))
    low = [delta[:, :1] @ delta[:1] for delta in full]
    for deltas, mode in ((full, "full"), (low, "lora"), ([*low[:2], full[2]], "full")):
        np.testing.assert_array_equal(merged("optmerge", deltas), merged("optmerge", deltas, mode=mode))


def test_optmerge_leaves_encoders_embeddings_heads_norms_and_biases() -> None:
    base = llama(0)
    out = merge_tensors("optmerge", [fine_tuned(base, seed) for seed in (1, 2)], base)
    kept = {name for name in base if np.array_equal(out[name], base[name])}
    assert kept == {name for name in base if "norm" in name or name in ("lm_head.weight", "model.embed_tokens.weight")}


def test_momentum_has_no_effect_on_adam() -> None:
    with pytest.raises(UsageError, match="momentum has no effect with mode: full"):
        merge_tensors("optmerge", [X, Y], BASE, parameters={"mode": "full", "momentum": 0.5})


# --- against the straightforward way --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 48), (80, 32), (32, 80)])
@pytest.mark.parametrize("name", ["tsv", "r_tsvm", "iso", "iso_cts", "wudi", "doge", "optmerge", "opcm"])
def test_errors_are_below_those_of_full_decompositions_and_loops_in_fp32(name: str, shape: tuple[int, int]) -> None:
    base, models, _ = matrix.inputs(shape, 0, False)
    given = [(base, models, [])]
    single, exact = (matrix.merge_plainly(name, given, dtype)[0] for dtype in (np.float32, np.float64))
    (found,) = matrix.merge_by_smelt(name, given, 1)
    assert np.linalg.norm(found - exact) < 0.5 * np.linalg.norm(single - exact)

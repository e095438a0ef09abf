"""Methods on whole matrices: factors per task, adapters' factors, aligned coordinates, merges that go on."""

from __future__ import annotations

import itertools
import tracemalloc
from dataclasses import replace
from pathlib import Path
from threading import Lock
from time import sleep
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import smelt
from smelt.engine import execute, memory
from smelt.engine.budget import Budget
from smelt.errors import InputRejected, OperationFailed, UsageError
from smelt.methods import task_matrices
from tests.readback import values
from tests.recipes import Family, recipe
from tests.tensors import BASE, X, Y, Z, assert_close, bits, model

MODELS = [X, Y, Z]


def drawn(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


# --- TSV-Compress: each task's leading triplets -------------------------------------------------------------


def compressed(**options: Any) -> dict[str, Any]:
    return smelt.merge_tensors("tsv", MODELS, BASE, parts=True, **options)


def test_factors_and_base_give_the_task_back() -> None:
    made = compressed()
    assert made["factors.1/matrix"].shape == (11, 65 + 1 + 33)
    assert_close(smelt.restore_task(made, BASE, 1), smelt.merge_tensors("tsv", MODELS, BASE, parameters={"task": 1}))


def test_a_task_is_its_task_vector_cut_to_a_rank() -> None:
    task = smelt.merge_tensors("tsv", MODELS, BASE, parameters={"task": 2})
    left, sigma, right = np.linalg.svd(np.float64(Z["matrix"]) - BASE["matrix"], full_matrices=False)
    cut = (left[:, :11] * sigma[:11]) @ right[:11]
    np.testing.assert_allclose(task["matrix"], BASE["matrix"] + cut, atol=1e-6)
    np.testing.assert_array_equal(task["row"], Z["row"])


def test_fewer_rows_of_factors_are_a_smaller_rank() -> None:
    full, small = compressed(parameters={"rank_fraction": 0.5}), compressed(parameters={"rank_fraction": 0.2})
    name = "factors.0/matrix"
    cut = {name: full[name][: len(small[name])], **{f"delta.0/{n}": full[f"delta.0/{n}"] for n in ("row", "one")}}
    assert_close(
        {"matrix": smelt.restore_task(cut, BASE, 0)["matrix"]},
        {"matrix": smelt.restore_task(small, BASE, 0)["matrix"]},
    )


def test_factors_of_no_change_are_zero() -> None:
    made = smelt.merge_tensors("tsv", [BASE], BASE, parts=True)
    assert not made["factors.0/matrix"].any()
    assert bits(smelt.restore_task(made, BASE, 0)) == bits(BASE)


def test_recipes_write_factors_as_arrays_do(family: Family, tmp_path: Path) -> None:
    tree = recipe("tsv", family.models, family.base, parameters={"exclude": ["lm_head"]}, output={"format": "parts"})
    for entry in tree["models"]:
        entry.pop("parameters")
    smelt.merge(tree, tmp_path / "parts")
    arrays = smelt.merge_tensors(
        "tsv", family.model_arrays, family.base_arrays, parameters={"exclude": ["lm_head"]}, parts=True
    )
    assert bits(values(tmp_path / "parts")) == bits(arrays)
    assert {str(array.dtype) for array in arrays.values()} == {"bfloat16"}
    smelt.restore_task(tmp_path / "parts", family.base, 1, tmp_path / "restored")
    restored = values(tmp_path / "restored")
    np.testing.assert_array_equal(restored["lm_head.weight"], family.model_arrays[1]["lm_head.weight"])
    assert smelt.verify(tmp_path / "restored").ok


def test_what_has_no_effect_on_factors_is_refused() -> None:
    with pytest.raises(UsageError, match="alpha has no effect where the parts of all tasks are made"):
        compressed(parameters={"alpha": 2.0})
    with pytest.raises(UsageError, match="orthogonalise has no effect with task: 0"):
        smelt.merge_tensors("tsv", MODELS, BASE, parameters={"task": 0, "orthogonalise": False})


def test_factors_that_do_not_fit_are_refused() -> None:
    other = {**BASE, "matrix": BASE["matrix"][:, :5]}
    with pytest.raises(InputRejected, match=r"\[11, 99\], which are no factors of what base has \(\[65, 5\]\)"):
        smelt.restore_task(compressed(), other, 0)
    with pytest.raises(OperationFailed, match="a task vector with NaN or Inf has no factors"):
        smelt.merge_tensors(
            "tsv", [{**X, "matrix": np.full_like(X["matrix"], np.nan)}], BASE, parts=True, on_nonfinite="allow"
        )


# --- factors of adapters, merged each as a matrix -----------------------------------------------------------


def adapters() -> list[dict[str, Any]]:
    return [{"a": drawn(4, 20, seed=i), "b": drawn(12, 4, seed=i), f"own.{i}": drawn(3, seed=i)} for i in range(3)]


def test_factors_of_adapters_need_no_base_and_keep_what_is_their_own() -> None:
    models = adapters()
    with pytest.raises(InputRejected, match=r"tensor 'own\.0' is missing in model 1, model 2"):
        smelt.merge_tensors("optmerge", models, parameters={"mode": "factors"})
    out = smelt.merge_tensors("optmerge", models, parameters={"mode": "factors"}, on_extra="copy")
    zeros = {name: np.zeros_like(models[0][name]) for name in ("a", "b")}
    based = smelt.merge_tensors("optmerge", models, zeros, parameters={"mode": "factors"}, on_extra="copy")
    assert bits(out) == bits(based)
    np.testing.assert_array_equal(out["own.2"], models[2]["own.2"])


def test_no_step_on_factors_is_their_mean() -> None:
    shared = [{"a": m["a"], "b": m["b"]} for m in adapters()]
    out = smelt.merge_tensors("optmerge", shared, parameters={"mode": "factors", "lr": 0.0})
    assert_close(out, {name: np.mean([m[name] for m in shared], axis=0) for name in ("a", "b")})


def test_tensors_of_some_models_must_agree_on_their_shape() -> None:
    models = [{"w": X["row"], "x": X["row"]}, {"w": X["row"], "x": X["matrix"]}, {"w": X["row"]}]
    with pytest.raises(InputRejected, match="'x': shapes differ"):
        smelt.merge_tensors("linear", models, parameters={"weight": 1.0}, on_extra="copy")


def test_narrow_factors() -> None:
    base, *models = (model(seed, ml_dtypes.bfloat16) for seed in range(3))
    made = smelt.merge_tensors("tsv", models, base, parts=True, parameters={"rank_fraction": 0.1})
    away = np.float32(smelt.restore_task(made, base, 0)["matrix"]) - np.float32(base["matrix"])
    assert np.linalg.matrix_rank(np.float32(made["factors.0/matrix"])) == 3
    assert 0.1 < np.linalg.norm(away) / np.linalg.norm(np.float32(models[0]["matrix"] - base["matrix"])) < 1


# --- KnOTS: shared coordinates ------------------------------------------------------------------------------

SHAPES = {"wide": (6, 40), "square": (12, 12), "tall": (70, 9)}


def family_of(count: int = 3, seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    base = {name: drawn(*shape, seed=seed) for name, shape in SHAPES.items()}
    return base, [{n: a + drawn(*a.shape, seed=seed + 1 + i) / 8 for n, a in base.items()} for i in range(count)]


def knots(base: Any, models: Any, **parameters: Any) -> dict[str, Any]:
    return smelt.merge_tensors("knots", models, base, parameters=parameters)


def knots_by_svd(base: Any, models: Any, share: float) -> dict[str, Any]:
    """The paper's steps, spelt out."""
    bases, coordinates = {}, {}
    for name in base:
        deltas = [np.float64(m[name]) - base[name] for m in models]
        left, sigma, right = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
        bases[name], coordinates[name] = left, np.split(sigma[:, None] * right, len(models), axis=1)
    bars = []
    for task in range(len(models)):
        every = np.sort(np.abs(np.concatenate([coordinates[name][task].ravel() for name in base])))
        bars.append(every[len(every) - int(len(every) * share) - 1])
    out = {}
    for name in base:
        kept = [np.where(np.abs(c) >= bar * (1 - 1e-6), c, 0) for c, bar in zip(coordinates[name], bars, strict=True)]
        sign = np.sign(sum(kept))
        agreeing = [np.where(c * sign > 0, c, 0) for c in kept]
        count = sum((c != 0).astype(int) for c in agreeing)
        out[name] = (base[name] + bases[name] @ (sum(agreeing) / np.maximum(count, 1))).astype(np.float32)
    return out


def test_knots_are_the_paper_s_steps() -> None:
    base, models = family_of()
    assert_close(knots(base, models), knots_by_svd(base, models, 0.2), ulps=40)
    assert_close(knots(base, models[:1]), knots_by_svd(base, models[:1], 0.2), ulps=40)


def test_what_is_linear_does_not_see_the_coordinates() -> None:
    base, models = family_of()
    mean = smelt.merge_tensors("task_arithmetic", models, base, parameters={"weight": 0.5 / 3})
    for side in ("output", "input"):
        assert_close(knots(base, models, rule="tv", density=1.0, alpha=0.5, shared=side), mean, ulps=20)
        total = knots(base, models, rule="tv", density=1.0, merge_func="sum", shared=side)
        assert_close(total, smelt.merge_tensors("task_arithmetic", models, base, parameters={"weight": 1.0}), ulps=20)


def test_the_sides_are_each_other_s_transposes() -> None:
    base, models = family_of()
    turned_base, *turned = ({n: np.ascontiguousarray(a.T) for n, a in m.items()} for m in (base, *models))
    first, second = knots(base, models, shared="input"), knots(turned_base, turned, shared="output")
    assert_close(first, {name: array.T for name, array in second.items()}, ulps=40)


def test_a_matrix_alone_has_its_own_threshold_in_either_scope() -> None:
    base, models = family_of()
    out = knots(base, models, scope="tensor")
    for name in base:
        alone = knots({name: base[name]}, [{name: m[name]} for m in models])
        np.testing.assert_array_equal(out[name], alone[name])


def test_low_rank_task_vectors_stay_of_low_rank() -> None:
    base = {"w": np.zeros((30, 20), np.float32)}
    models = [{"w": drawn(30, 2, seed=i) @ drawn(2, 20, seed=i)} for i in range(3)]
    out = knots(base, models)["w"]
    assert np.linalg.matrix_rank(out, tol=1e-4) == 6
    none = [{"w": base["w"]}, *models[:2]]
    assert np.isfinite(knots(base, none)["w"]).all()


def test_dropped_coordinates_are_made_up_for() -> None:
    base, models = family_of()
    plain = {"rule": "tv", "density": 1.0, "merge_func": "sum"}
    runs = [
        smelt.merge_tensors("knots", models, base, parameters={**plain, "drop_rate": 0.3}, seed=seed)["wide"]
        for seed in range(200)
    ]
    away = np.mean(runs, axis=0) - knots(base, models, **plain)["wide"]
    assert np.abs(away).max() < 0.3 * np.abs(runs[0] - runs[1]).max()


# --- OPCM: the order ----------------------------------------------------------------------------------------


def test_shuffled_models_are_taken_in_an_order_that_the_seed_draws() -> None:
    base, models = family_of()

    def merged(given: Any, **more: Any) -> Any:
        return bits(smelt.merge_tensors("opcm", given, base, **more))

    orders = [merged([models[i] for i in order]) for order in itertools.permutations(range(3))]
    found = [merged(models, parameters={"shuffle": True}, seed=seed) for seed in range(12)]
    assert all(one in orders for one in found)
    assert sum(one in found for one in orders) > 3
    assert found[5] == merged(models, parameters={"shuffle": True}, seed=5)


# --- memory: what is planned is what is held ----------------------------------------------------------------

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "tsv": ("tsv", {}), "task": ("tsv", {"task": 0}), "r_tsvm": ("r_tsvm", {}), "iso_c": ("iso", {"variant": "iso_c"}),
    "iso_cts": ("iso", {"variant": "iso_cts"}), "knots": ("knots", {"scope": "tensor"}),
    "wudi": ("wudi", {"variant": "wudi", "iter_num": 2}), "aswudi": ("wudi", {}), "doge": ("doge", {"steps": 2}),
    "full": ("optmerge", {"mode": "full", "iter_num": 2}), "lora": ("optmerge", {"mode": "lora"}),
    "opcm": ("opcm", {}), "lore": ("lore", {"max_iter": 2, "threshold": 0.05}), "regmean": ("regmean", {}),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(192, 192), (352, 96), (96, 352)])
@pytest.mark.parametrize("run", RUNS)
def test_matrix_methods_hold_what_they_say(run: str, shape: tuple[int, int], monkeypatch: Any) -> None:
    """numpy's arrays as they are counted, and three squares where it is numpy that calls LAPACK."""
    name, parameters = RUNS[run]
    method, peaks, seen = smelt.methods.get(name), [0], []
    base = drawn(*shape)
    models = [{"w": base + drawn(*shape, seed=i) / 100} for i in range(1, 5)]
    grams = [{"gram": {"w": np.float32(np.cov(drawn(2 * shape[1], shape[1], seed=i).T))}} for i in range(4)]

    def run_whole(*given: Any) -> None:
        tracemalloc.start()
        try:
            original(*given)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    def eigh(matrix: Any) -> Any:
        found = eigenpairs(matrix)
        turns.append(tracemalloc.get_traced_memory()[0] + 24 * len(matrix) ** 2)
        return found

    turns, eigenpairs = [0], np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", eigh)
    original, merge = execute.run_whole, method.merge
    monkeypatch.setattr(execute, "run_whole", run_whole)
    watched = replace(method, merge=lambda tensor: seen.append(tensor) or merge(tensor))
    monkeypatch.setattr(memory, "get", lambda _: watched)
    smelt.merge_tensors(
        name, models, None if method.base == "ignored" else {"w": base}, parameters=parameters,
        statistics=grams if name == "regmean" else None,
    )  # fmt: skip
    most = max(peaks + turns) + (24 * shape[1] ** 2 if run == "regmean" else 0)
    _, each = method.holds(seen[0])
    assert 0.85 < each * base.size / most < 1.18


def test_a_group_that_does_not_fit_is_refused_with_what_it_needs(family: Family) -> None:
    tree = recipe("tsv", family.models, family.base)
    for entry in tree["models"]:
        entry.pop("parameters")
    planned = smelt.plan(tree, memory="100GiB", threads=1)
    planned.close()
    least = max(256, -(-planned.peak_memory >> 20))
    with pytest.raises(UsageError, match=rf"needed with 64 threads \({least}MiB with one\), 300MiB allowed"):
        smelt.plan(tree, memory="300MiB", threads=64)
    smelt.plan(tree, memory=f"{least}MiB", threads=1).close()


def test_large_matrices_wait_for_each_other(family: Family, tmp_path: Path, monkeypatch: Any) -> None:
    """Two at once where they fit, one by one where not; the result is the same, and the plan says what is held."""
    tree = recipe("wudi", family.models, family.base)
    for entry in tree["models"]:
        entry.pop("parameters", None)
    running, most, lock = [0], [0], Lock()
    original = execute.run_whole

    def run_whole(*given: Any) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        sleep(0.002)
        original(*given)
        with lock:
            running[0] -= 1

    monkeypatch.setattr(execute, "run_whole", run_whole)
    monkeypatch.setattr(Budget, "matrices", property(lambda budget: 1))
    smelt.merge(tree, tmp_path / "apart", threads=4)
    alone, most[0] = most[0], 0
    monkeypatch.setattr(Budget, "matrices", property(lambda budget: 1 << 40))
    smelt.merge(tree, tmp_path / "together", threads=4)
    assert (alone, most[0] > 1) == (1, True)
    assert bits(values(tmp_path / "apart")) == bits(values(tmp_path / "together"))


STRIPS = [("tsv", {}), ("tsv", {"orthogonalise": False}), ("wudi", {}), ("wudi", {"auto_rank_method": "wudi_risk"})]


@pytest.mark.parametrize(("name", "parameters"), STRIPS)
def test_strips_of_any_length_give_the_same(name: str, parameters: dict[str, Any], monkeypatch: Any) -> None:
    base = drawn(60, 12)
    models = [{"w": base + drawn(60, 12, seed=i) / 9} for i in range(1, 4)]
    whole = smelt.merge_tensors(name, models, {"w": base}, parameters=parameters, dtype="float64")["w"]
    monkeypatch.setattr(task_matrices, "STRIP", 12 * 7)
    strips = smelt.merge_tensors(name, models, {"w": base}, parameters=parameters, dtype="float64")["w"]
    np.testing.assert_allclose(strips, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(40, 9), (9, 40)])
def test_gaps_that_are_let_pass_come_out_where_they_were(shape: tuple[int, int], monkeypatch: Any) -> None:
    monkeypatch.setattr(task_matrices, "STRIP", 9 * 7)
    base = drawn(*shape)
    models = [{"w": base + drawn(*shape, seed=i) / 9} for i in range(1, 4)]
    models[1]["w"][7, 3] = np.nan
    out = smelt.merge_tensors("tsv", models, {"w": base}, on_nonfinite="allow")["w"]
    assert np.argwhere(np.isnan(out)).tolist() == [[7, 3]]


def test_what_is_scaled_by_layer_afterwards_is_so_strip_by_strip(monkeypatch: Any) -> None:
    monkeypatch.setattr(task_matrices, "STRIP", 9 * 7)
    base = {f"model.layers.{i}.self_attn.q_proj.weight": drawn(40, 9, seed=i) for i in range(2)}
    models = [{name: w + drawn(40, 9, seed=5 + i) / 9 for name, w in base.items()} for i in range(3)]
    plain = smelt.merge_tensors("tsv", models, base)
    lines = smelt.merge_tensors("tsv", models, base, lines={"alpha": 0.25, "beta": 0.5})
    for factor, name in zip((0.25, 0.75), base, strict=True):
        np.testing.assert_allclose(lines[name] - base[name], factor * (plain[name] - base[name]), atol=1e-6)

"""LiNeS: layers, factors, and other methods under it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import smelt
from smelt.architecture import Structure
from smelt.errors import UsageError
from smelt.kernels.program import Whole
from smelt.methods import Tensor
from tests.recipes import Family, recipe
from tests.small_models import Arrays
from tests.tensors import bits

LAYERS = 4
CONFIG = {"num_hidden_layers": LAYERS}


def model(seed: int, dtype: Any = np.float32) -> Arrays:
    noise = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (9, 5), "norm.weight": (5,), "head.weight": (9, 5)}
    shapes |= {f"layers.{i}.mlp.weight": (7, 5) for i in range(LAYERS)}
    base = {name: np.random.default_rng(0).standard_normal(shape) for name, shape in shapes.items()}
    scale = 0.1 if seed else 0
    return {name: (array + scale * noise.standard_normal(array.shape)).astype(dtype) for name, array in base.items()}


BASE, X, Y, Z = (model(seed) for seed in range(4))


def ratios(merged: Arrays, whole: Arrays) -> dict[str, float]:
    """The factor of each tensor's update: how much of the update in ``whole`` is left."""
    found = {}
    for name, base in BASE.items():
        left, full = merged[name] - base, whole[name] - base
        found[name] = float(np.vdot(left, full) / np.vdot(full, full))
    return found


# --- one model ------------------------------------------------------------------------------------------


def test_the_factor_grows_with_the_layer_and_is_alpha_outside() -> None:
    found = ratios(smelt.merge_tensors("lines", [X], BASE, parameters={"alpha": 0.4, "beta": 0.9}), X)
    for i in range(LAYERS):
        assert found[f"layers.{i}.mlp.weight"] == pytest.approx(0.4 + 0.3 * i, abs=1e-5)
    assert [found[n] for n in ("embed.weight", "norm.weight", "head.weight")] == pytest.approx([0.4] * 3, abs=1e-5)


def test_the_last_layer_of_one_model_keeps_its_update() -> None:
    found = ratios(smelt.merge_tensors("lines", [X], BASE, parameters={"alpha": 0.2}), X)
    assert found["layers.3.mlp.weight"] == pytest.approx(1, abs=1e-5)
    one = ratios(smelt.merge_tensors("lines", [X], BASE, parameters={"alpha": 0.2, "outside": "one"}), X)
    assert (one["head.weight"], one["layers.0.mlp.weight"]) == pytest.approx((1, 0.2), abs=1e-5)


def test_alpha_zero_keeps_the_first_layer_and_the_outside_of_the_base() -> None:
    out = smelt.merge_tensors("lines", [X], BASE, parameters={"alpha": 0.0})
    kept = {name for name in BASE if np.array_equal(out[name], BASE[name])}
    assert kept == {"embed.weight", "norm.weight", "head.weight", "layers.0.mlp.weight"}


def test_alpha_one_and_beta_zero_is_the_model() -> None:
    out = smelt.merge_tensors("lines", [X], BASE, parameters={"alpha": 1.0, "beta": 0.0})
    np.testing.assert_allclose(out["head.weight"], X["head.weight"], rtol=0, atol=2.0**-21)


NAMES = {
    "t5": (["encoder.block.{i}.layer.0.DenseReluDense.wi.weight", "decoder.block.{i}.layer.1.attn.q.weight"], 3),
    "mixture": (["model.layers.{i}.mlp.experts.2.up_proj.weight", "model.layers.{i}.mlp.experts.0.up_proj.weight"], 4),
    "clip": (["visual.transformer.resblocks.{i}.attn.out_proj.weight", "transformer.resblocks.{i}.attn.out.bias"], 3),
}


@pytest.mark.parametrize("family", NAMES)
def test_every_stack_has_its_own_axis_and_experts_the_layer_they_are_in(family: str) -> None:
    patterns, count = NAMES[family]
    names = {pattern.format(i=i): i / (count - 1) for pattern in patterns for i in range(count)}
    shapes = dict.fromkeys(names, (2, 2))
    for structure in (Structure.by_names(shapes), Structure.of(shapes, {"num_layers": count})):
        assert {name: structure[name].depth for name in names} == names


def test_single_modules_in_a_row_are_no_layers() -> None:
    structure = Structure.by_names({"head.0.weight": (2, 2), "head.1.weight": (2, 2), "h.1.mlp.w": (2,)})
    assert structure.stacks == ()


# --- after another method -------------------------------------------------------------------------------

INNER: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"lambda": 0.7},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5, "weight": 0.5},
    "consensus": {},
    "emr_merging": {"task": 1},
}


@pytest.mark.parametrize("method", INNER)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_scaling_by_one_changes_no_bit(method: str, dtype: Any) -> None:
    base, *models = (model(seed, dtype) for seed in range(3))
    plain = smelt.merge_tensors(method, models, base, parameters=INNER[method], seed=3)
    one = {"alpha": 1.0, "beta": 0.0}
    assert bits(smelt.merge_tensors(method, models, base, parameters=INNER[method], seed=3, lines=one)) == bits(plain)


@pytest.mark.parametrize("method", INNER)
def test_what_a_method_merges_is_scaled_by_layer(method: str) -> None:
    plain = smelt.merge_tensors(method, [X, Y], BASE, parameters=INNER[method])
    out = smelt.merge_tensors(method, [X, Y], BASE, parameters=INNER[method], lines={"alpha": 0.25, "beta": 1.5})
    found = ratios(out, plain)
    assert [found[f"layers.{i}.mlp.weight"] for i in range(4)] == pytest.approx([0.25, 0.75, 1.25, 1.75], abs=1e-5)
    assert found["head.weight"] == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "consensus"])
def test_alpha_comes_from_the_norms(method: str, norm: str) -> None:
    models = [X, Y, Z]
    plain = smelt.merge_tensors(method, models, BASE, parameters=INNER[method])
    order = 1 if norm == "l1" else 2
    merged = np.concatenate([(plain[n] - BASE[n]).ravel() for n in BASE])
    added = np.concatenate([sum(m[n] - BASE[n] for m in models).ravel() for n in BASE])
    alpha = np.linalg.norm(added, order) / np.linalg.norm(merged, order) / 3
    lines = {"beta": 0.5, "norm": norm}
    out = smelt.merge_tensors(method, models, BASE, parameters=INNER[method], lines=lines)
    assert ratios(out, plain)["head.weight"] == pytest.approx(alpha, rel=1e-4)


def test_nothing_merged_gives_the_base() -> None:
    out = smelt.merge_tensors("task_arithmetic", [BASE, BASE], BASE, lines={"beta": 1.0})
    assert bits(out) == bits(dict(sorted(BASE.items())))


@pytest.mark.parametrize("method", INNER)
def test_lines_is_the_same_through_torch_and_with_any_threads(method: str) -> None:
    pytest.importorskip("torch")
    more: dict[str, Any] = {"parameters": INNER[method], "lines": {"beta": 0.5}}
    first = smelt.merge_tensors(method, [X, Y], BASE, threads=1, **more)
    assert bits(smelt.merge_tensors(method, [X, Y], BASE, threads=3, **more)) == bits(first)
    assert bits(smelt.merge_tensors(method, [X, Y], BASE, device="cpu:0", **more)) == bits(first)


def halfway(base: Any, model: Any) -> Any:
    return (base + model) / 2


@pytest.mark.parametrize("by_rows", [False, True])
def test_matrix_functions_are_scaled_too(by_rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And measured, where they go row by row."""

    def merge(tensor: Tensor) -> Whole:
        return Whole(halfway, {"base": tensor.base, "model": tensor.models[0]}, by_rows=by_rows)

    method = replace(smelt.methods.get("task_arithmetic"), merge=merge)
    monkeypatch.setattr("smelt.engine.memory.get", lambda name: method)
    plain = smelt.merge_tensors("any", [X], BASE)
    out = smelt.merge_tensors("any", [X], BASE, lines={"alpha": 0.5, "beta": 0.0})
    assert list(ratios(out, plain).values()) == pytest.approx([0.5] * len(BASE), abs=1e-5)
    if by_rows:
        found = ratios(smelt.merge_tensors("any", [X], BASE, lines={"beta": 0.0}), plain)
        assert list(found.values()) == pytest.approx([2.0] * len(BASE), rel=1e-5)
    else:
        with pytest.raises(UsageError, match="is not known beforehand: give alpha"):
            smelt.merge_tensors("any", [X], BASE, lines={"beta": 0.0})


# --- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_recipe_s_lines_are_those_of_arrays(method: str, family: Family, tmp_path: Path) -> None:
    parameters = {"variant": "mergekit"} | ({"density": 0.5} if method == "ties" else {})
    tree = recipe(method, family.models, family.base, parameters=parameters, lines={"beta": 0.5})
    smelt.merge(tree, tmp_path / "out")
    direct = smelt.merge_tensors(
        method, family.model_arrays, family.base_arrays, parameters={**parameters, "weight": 1.0},
        lines={"beta": 0.5},
    )  # fmt: skip
    assert bits(dict(smelt.load(tmp_path / "out"))) == bits(direct)
    assert "with LiNeS" in (tmp_path / "out" / "README.md").read_text()


def test_slices_are_scaled_by_the_layer_that_comes_out(family: Family, tmp_path: Path) -> None:
    """The base's first layer twice: in place of layer 1 it is scaled as the last."""
    first = {"layer_range": [0, 1], "parameters": {"weight": 1}}
    piece = {"sources": [{"model": path, **first} for path in (family.base, family.models[0])]}
    tree = {
        "merge_method": "task_arithmetic",
        "base_model": family.base,
        "slices": [piece, piece],
        "out_dtype": "float32",
    }
    smelt.merge({**tree, "lines": {"alpha": 0.5, "beta": 1.0}}, tmp_path / "out")
    out = smelt.load(tmp_path / "out")
    names = [n for n in out if ".layers.0." in n]
    assert names
    for name in names:
        base, tuned = (np.float32(arrays[name]) for arrays in (family.base_arrays, family.model_arrays[0]))
        np.testing.assert_allclose(out[name], base + np.float32(0.5) * (tuned - base), atol=1e-6)
        last = name.replace(".layers.0.", ".layers.1.")
        np.testing.assert_allclose(out[last], base + np.float32(1.5) * (tuned - base), atol=1e-6)


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "lines", "message"),
    [
        ("task_arithmetic", {}, "lines: beta is required"),
        ("task_arithmetic", {"beta": 1.0, "alpha": -1.0}, r"alpha must lie in \[0, inf\)"),
        ("task_arithmetic", {"beta": 1.0, "gamma": 1}, "lines has no parameter 'gamma'"),
        ("task_arithmetic", {"beta": 1.0, "alpha": 0.5, "norm": "l2"}, "norm has no effect where alpha is given"),
        ("linear", {"beta": 1.0}, "lines scales task vectors, which linear has not"),
    ],
)
def test_wrong_lines(method: str, lines: dict[str, Any], message: str, family: Family) -> None:
    with pytest.raises(UsageError, match=message):
        smelt.merge_tensors(method, [X, Y], None if method == "linear" else BASE, lines=lines)
    base = None if method == "linear" else family.base
    with pytest.raises(UsageError, match=message):
        smelt.plan(recipe(method, family.models, base, lines=lines))


def test_mistakes_in_a_recipe_have_their_place(tmp_path: Path, family: Family) -> None:
    path = tmp_path / "recipe.yml"
    models = "\n".join(f"- model: {m}" for m in family.models)
    path.write_text(
        f"merge_method: task_arithmetic\nbase_model: {family.base}\nmodels:\n{models}\n"
        "lines:\n  beta: [0, 1]\n  alpha: {filter: mlp, value: 1}\n"
    )
    with pytest.raises(UsageError) as told:
        smelt.plan(path)
    assert [problem.split(":")[1] for problem in told.value.problems] == ["8", "9"]
    assert all("must be a single value" in problem for problem in told.value.problems)


def test_models_without_layers_are_refused() -> None:
    loose = [{"a.weight": array["norm.weight"]} for array in (X, Y, BASE)]
    for method, lines in (("lines", None), ("task_arithmetic", {"beta": 1.0})):
        with pytest.raises(UsageError, match="no tensor is known to belong to a layer"):
            smelt.merge_tensors(method, loose[: 1 if lines is None else 2], loose[2], lines=lines)
    smelt.merge_tensors("lines", [X], BASE, config=CONFIG)
    with pytest.raises(UsageError, match="no tensor is known to belong to a layer"):
        smelt.merge_tensors("lines", [X], BASE, config={"num_hidden_layers": 7})

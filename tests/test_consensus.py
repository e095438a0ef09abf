"""SCE, VaRM and PCB-Merging: what their weights and scores promise, against plain numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.architecture import Structure
from smelt.errors import UsageError
from smelt.kernels.arrays import apply
from smelt.kernels.functions import exp_of_negative, tanh, tanh_of_small
from smelt.methods import Tensor
from smelt.methods.varm import unit_of
from tests.recipes import Family, recipe
from tests.small_models import CONFIG, shapes
from tests.tensors import BASE, X, Y, Z, assert_close, bits

merge_tensors = smelt.merge_tensors
UNITS = ("module", "layer", "model")


def vector(*values: float) -> dict[str, Any]:
    return {"w": np.array(values, np.float32)}


def zeros(count: int) -> dict[str, Any]:
    return vector(*[0.0] * count)


def drawn(seed: int, count: int = 3000) -> dict[str, Any]:
    return {"w": np.random.default_rng(seed).standard_normal(count).astype(np.float32)}


# --- exp and tanh ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "wanted", "low", "high"),
    [(exp_of_negative, np.exp, -86, 0), (tanh_of_small, np.tanh, -1, 1), (tanh, np.tanh, -20, 20)],
)
def test_functions_are_right_to_a_few_units_in_the_last_place(formula: Any, wanted: Any, low: int, high: int) -> None:
    x = np.concatenate([np.linspace(low, high, 20_011), -(10.0 ** np.linspace(-30, 0, 300))]).astype(np.float32)
    np.testing.assert_allclose(apply(formula, {"x": x}), wanted(np.float64(x)), rtol=4e-7, atol=0)


def test_tanh_far_out_is_one() -> None:
    np.testing.assert_array_equal(apply(tanh, {"x": np.array([1e30, -1e30, 0], np.float32)}), [1, -1, 0])


# --- SCE ------------------------------------------------------------------------------------------------


def oracle_sce(models: list[Any], share: float, selects_values: bool) -> Any:
    """SCE on a base of zero, one tensor."""
    taus = np.float64([model["w"] for model in models])
    spread = taus.var(axis=0)
    mask = np.ones(len(spread), bool)
    if share < 1:
        mask[:] = False
        mask[np.argsort(-spread, kind="stable")[: int(share * (spread > 0).sum())]] = True
    weights = (taus**2 * mask).sum(axis=1)
    weights = weights / weights.sum() if weights.sum() else np.full(len(taus), 1 / len(taus))
    if selects_values:
        taus = taus * mask
    direction = np.where(taus.sum(axis=0) >= 0, 1, -1)
    agrees = taus * direction > 0
    mass = (weights[:, None] * agrees).sum(axis=0)
    return (weights[:, None] * taus * agrees).sum(axis=0) / np.where(mass == 0, 1, mass)


@pytest.mark.parametrize("variant", ["paper", "fusechat"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
def test_sce_is_the_formula(variant: str, share: float) -> None:
    models = [drawn(seed) for seed in range(3)]
    out = merge_tensors("sce", models, zeros(3000), parameters={"variant": variant, "select_topk": share})
    np.testing.assert_allclose(out["w"], oracle_sce(models, share, variant == "paper"), atol=1e-5)


def test_sce_selects_the_first_of_equal_variances() -> None:
    models = [vector(1, 1, 1, 1, 2), vector(-1, -1, -1, -1, 2)]
    out = merge_tensors("sce", models, zeros(5), parameters={"select_topk": 0.5})
    np.testing.assert_array_equal(out["w"], [1, 1, 0, 0, 0])


def test_only_mergekits_sce_depends_on_the_size_of_the_changes() -> None:
    """Below its floor the weights are even; scaled by a power of two, the other flavours give the same bits."""
    for variant in ("paper", "fusechat", "mergekit"):
        parameters = {"variant": variant, "select_topk": 0.5}
        models = [vector(3, 1, -2, 0.5), vector(1, 2, -1, 0.25)]
        small = [{"w": model["w"] * np.float32(2**-20)} for model in models]
        here, there = (merge_tensors("sce", m, zeros(4), parameters=parameters)["w"] for m in (models, small))
        assert (here == there * 2**20).all() == (variant != "mergekit")


# --- VaRM -----------------------------------------------------------------------------------------------


def layered(arrays: Any) -> dict[str, Any]:
    """Two layers of the same tensors."""
    return {f"layers.{i}.mlp.{name}.weight": array for i in (0, 1) for name, array in arrays.items()}


@pytest.mark.parametrize("granularity", ["element", "matrix", *UNITS])
class TestVarm:
    def test_only_the_proportion_of_changes_counts(self, granularity: str) -> None:
        """Scaling all task vectors by a power of two scales the merged one."""
        models = [layered(X), layered(Y)]
        base = {name: np.zeros_like(array) for name, array in models[0].items()}
        eighth = [{name: array / np.float32(8) for name, array in model.items()} for model in models]
        out, small = (
            merge_tensors("varm", given, base, parameters={"granularity": granularity}) for given in (models, eighth)
        )
        assert bits({name: array * np.float32(8) for name, array in small.items()}) == bits(out)

    def test_two_that_moved_equally_far_are_averaged(self, granularity: str) -> None:
        base = layered(BASE)
        models = [{n: np.asarray(a + np.float32(s) * np.sign(a)) for n, a in base.items()} for s in (0.25, -0.25)]
        assert_close(merge_tensors("varm", models, base, parameters={"granularity": granularity}), base)

    def test_an_unchanged_model_has_no_say(self, granularity: str) -> None:
        changed, base = layered(X), layered(BASE)
        out = merge_tensors("varm", [changed, base], base, parameters={"granularity": granularity})
        assert_close(out, changed, ulps=1)


def test_layers_must_be_known() -> None:
    with pytest.raises(UsageError, match="granularity: layer: no tensor is known to belong to a layer"):
        merge_tensors("varm", [X, Y], BASE, parameters={"granularity": "layer"})


def test_the_reference_averages_evenly_where_one_model_is_unchanged() -> None:
    parameters = {"variant": "reference"}
    assert bits(merge_tensors("varm", [X, BASE], BASE, parameters=parameters)) == bits(
        merge_tensors("varm", [X, BASE], BASE, parameters={"use_softmax": True, "temperature": 1e30})
    )


def test_varm_sums_means_over_a_module_and_a_layer() -> None:
    names = [
        "model.layers.0.mlp.up.weight",
        "model.layers.0.mlp.down.weight",
        "model.layers.0.norm.weight",
        "head.weight",
    ]
    base = {name: np.zeros((4, 2) if "up" in name else 3, np.float32) for name in names}
    sizes = {0: dict(zip(names, (2, 1, 1, 1), strict=True)), 1: dict(zip(names, (1, 1, 3, 2), strict=True))}
    models = [{n: base[n] + np.float32(sizes[i][n]) for n in names} for i in sizes]
    module, layer = (
        {
            name: float(array.flat[0])
            for name, array in merge_tensors(
                "varm", models, base, parameters={"granularity": granularity}, config={"num_hidden_layers": 1}
            ).items()
        }
        for granularity in ("module", "layer")
    )
    mlp = (4 + 1) / (4 + 1 + 1 + 1)
    block = (4 + 1 + 1) / (4 + 1 + 1 + 1 + 1 + 9)
    assert module == pytest.approx(dict(zip(names, (1 + mlp, 1, 0.1 + 0.9 * 3, 0.2 + 0.8 * 2), strict=True)))
    assert layer == pytest.approx(dict(zip(names, (1 + block, 1, block + (1 - block) * 3, 1.5), strict=True)))


@pytest.mark.parametrize(
    ("name", "module", "layer"),
    [
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp", "model.layers.1"),
        ("model.layers.1.input_layernorm.weight", "model.layers.1.input_layernorm", "model.layers.1"),
        ("model.norm.weight", "model.norm", None),
        ("lm_head.weight", "lm_head", None),
        ("weight", "", None),
    ],
)
def test_units_follow_from_roles(name: str, module: str, layer: str | None) -> None:
    structure = Structure.of(shapes(), CONFIG)
    found = [unit_of(Tensor(name, None, (), {"granularity": g}, {}, role=structure.get(name))) for g in UNITS]
    assert found == [module, layer, ""]


def test_varm_keeps_the_first_models_tensor_where_one_is_excluded(family: Family, tmp_path: Path) -> None:
    out = merge_tensors("varm", [X, Y], BASE, parameters={"exclude": ["matrix"]})
    assert out["matrix"].tobytes() == X["matrix"].tobytes()
    tree = recipe("varm", family.models[:2], family.base, parameters={"exclude": ["lm_head"]})
    smelt.merge(tree, tmp_path / "out")
    with smelt.load(tmp_path / "out") as merged:
        assert merged["lm_head.weight"].tobytes() == family.model_arrays[0]["lm_head.weight"].tobytes()


# --- PCB ------------------------------------------------------------------------------------------------


def oracle_pcb(models: list[Any], variant: str, ratio: float, clip: float) -> Any:
    """PCB-Merging on a base of zero, by sorting."""
    taus = np.float64([model["w"] for model in models])
    n, d = taus.shape

    def between(rows: Any, low: int, high: int) -> Any:
        ordered = np.sort(rows, axis=1)
        return np.clip(rows, ordered[:, low, None], ordered[:, high, None])

    def rescaled(rows: Any) -> Any:
        low, high = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
        return (rows - low) / (high - low)

    sizes = between(abs(taus), int(d * clip), int(d * (1 - clip) - 1))
    units = np.sign(taus) * rescaled(sizes)
    inter = {
        "es": np.tanh(units[:, None] * units[None]).sum(axis=1),
        "vision": np.tanh(taus * units.sum(axis=0)),
        "nlp": np.tanh(taus * taus.sum(axis=0)),
    }[variant]
    scales = rescaled(between(np.exp(n * units**2) * inter, int(d * (1 - ratio)), d - 1))
    return (np.sign(taus) * sizes * scales).sum(axis=0) / np.maximum(scales.sum(axis=0), 1e-12)


@pytest.mark.parametrize("variant", ["es", "vision", "nlp"])
@pytest.mark.parametrize(("ratio", "clip"), [(0.1, 0.01), (0.97, 0.0)])
def test_pcb_is_the_formula(variant: str, ratio: float, clip: float) -> None:
    """At ratio 0.97 the quantile is negative: more than three in a hundred scores are."""
    models = [drawn(seed) for seed in range(3)]
    parameters = {"variant": variant, "ratio": ratio, "clip": clip, "lambda": 1.0}
    out = merge_tensors("pcb", models, zeros(3000), parameters=parameters)
    np.testing.assert_allclose(out["w"], oracle_pcb(models, variant, ratio, clip), atol=2e-5)


def test_pcb_keeps_the_stated_share_of_the_whole_model_or_of_each_tensor() -> None:
    for scope in ("model", "tensor"):
        parameters = {"ratio": 0.2, "scope": scope, "scale_of": 1}
        scores = merge_tensors("pcb", [X, Y], BASE, parameters=parameters)
        groups = [np.concatenate([a.ravel() for a in scores.values()])] if scope == "model" else [scores["matrix"]]
        for group in groups:
            assert (group > 0).sum() == group.size - int(group.size * 0.8) - 1
            assert (group.min(), group.max()) == (0, 1)


def test_pcb_es_does_not_depend_on_the_size_of_the_changes() -> None:
    models = [drawn(seed) for seed in range(2)]
    small = [{"w": model["w"] * np.float32(2**-20)} for model in models]
    out = merge_tensors("pcb", models, zeros(3000))["w"]
    assert (merge_tensors("pcb", small, zeros(3000))["w"] * np.float32(2**20) == out).all()


def test_pcb_of_one_model_takes_the_clipped_value_or_the_base() -> None:
    out = merge_tensors("pcb", [X], BASE, parameters={"clip": 0.0})
    taken = out["matrix"] != BASE["matrix"]
    assert 0.05 < taken.mean() < 0.1 + 1e-3
    np.testing.assert_allclose(out["matrix"][taken], X["matrix"][taken], atol=1e-6)


def test_a_model_without_spread_has_no_scores() -> None:
    """Nothing learnt, or one size throughout: the others decide alone."""
    alone = merge_tensors("pcb", [drawn(1)], zeros(3000))
    flat = {"w": np.full(3000, 0.5, np.float32)}
    for idle in (zeros(3000), flat):
        scores = merge_tensors("pcb", [drawn(1), idle], zeros(3000), parameters={"scale_of": 1})
        assert not scores["w"].any()
    assert alone["w"].any()


def test_scores_without_spread_count_as_one() -> None:
    """Two sizes only: the larger ones all have the highest score."""
    tau = {"w": np.tile(np.float32([1, 1, 1, 2]), 500)}
    scores = merge_tensors("pcb", [tau], zeros(2000), parameters={"scale_of": 0})
    np.testing.assert_array_equal(scores["w"], np.tile([0, 0, 0, 1], 500))


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("sce", {"select_topk": 1.5}, r"select_topk must lie in \[0, 1\]"),
        ("varm", {"granularity": "row"}, "granularity must be one of element, matrix, module, layer, model"),
        ("varm", {"temperature": 2.0}, "temperature has no effect with use_softmax: False"),
        (
            "varm",
            {"granularity": "element", "use_softmax": True},
            "use_softmax has no effect with granularity: element",
        ),
        ("pcb", {"ratio": 0.0}, r"ratio must lie in \(0, 1\]"),
        ("pcb", {"clip": 0.4}, r"clip must lie in \[0, 0.25\]"),
        ("pcb", {"scale_of": 2}, "scale_of must be below the number of models, 2, not 2"),
        ("pcb", {"variant": "paper"}, "variant must be one of es, released, nlp, vision"),
    ],
)
def test_wrong_parameters_are_usage_errors(method: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merge_tensors(method, [X, Z], BASE, parameters=parameters)

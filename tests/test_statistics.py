"""Statistics checkpoints: how they reach a method, in memory and from recipes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import smelt
from smelt.errors import InputRejected, OperationFailed, UsageError
from tests.given import Given, save_statistics, statistics_for
from tests.readback import values
from tests.recipes import Family, recipe
from tests.small_models import Arrays
from tests.tensors import BASE, X, Y, bits

FISHER = smelt.methods.get("fisher")


def fishers(family: Family) -> list[Given]:
    return statistics_for(FISHER, {}, family.model_arrays[:2])


def fisher_recipe(family: Family, *paths: str, **more: Any) -> dict[str, Any]:
    tree = recipe("fisher", family.models[:2], **more)
    for entry, path in zip(tree["models"], paths, strict=False):
        entry["statistics"] = path
    return tree


# --- where a recipe finds them ------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["{kind}/{name}", "{name}.{kind}", "{name}"])
def test_tensors_are_found_in_every_spelling(spelling: str, family: Family, tmp_path: Path) -> None:
    given = fishers(family)
    for index, kinds in enumerate(given):
        flat = {spelling.format(kind="fisher", name=name): array for name, array in kinds["fisher"].items()}
        save_file(flat, tmp_path / f"{index}.safetensors", {"kind": "fisher"})
    smelt.merge(fisher_recipe(family, *(str(tmp_path / f"{i}.safetensors") for i in range(2))), tmp_path / "out")
    expected = smelt.merge_tensors("fisher", family.model_arrays[:2], statistics=given)
    assert bits(values(tmp_path / "out")) == bits(expected)


def test_a_bare_name_of_another_kind_is_not_taken(family: Family, tmp_path: Path) -> None:
    for index, kinds in enumerate(fishers(family)):
        save_file(kinds["fisher"], tmp_path / f"{index}.safetensors", {"kind": "gram"})
    with pytest.raises(InputRejected, match="no fisher of 21 tensor"):
        smelt.plan(fisher_recipe(family, *(str(tmp_path / f"{i}.safetensors") for i in range(2))))


def test_what_is_read_is_planned_and_recorded(family: Family, tmp_path: Path) -> None:
    given = fishers(family)
    paths = [save_statistics(tmp_path / f"fisher{i}.safetensors", kinds) for i, kinds in enumerate(given)]
    weights = sum(array.nbytes for model in family.model_arrays[:2] for array in model.values())
    beside = sum(array.nbytes for kinds in given for array in kinds["fisher"].values())
    with_norms = smelt.plan(fisher_recipe(family, *paths))
    assert with_norms.bytes_read == 2 * (weights + beside)
    assert with_norms.as_dict()["statistics"] == paths
    with_norms.close()
    smelt.merge(fisher_recipe(family, *paths), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "smelt-manifest.json").read_text())
    assert [entry["model"] for entry in manifest["statistics"]] == ["fisher0.safetensors", "fisher1.safetensors"]
    assert [entry["tensors_read"] for entry in manifest["statistics"]] == [len(family.base_arrays)] * 2
    assert len({entry["digest"] for entry in (*manifest["statistics"], *manifest["inputs"])}) == 4
    assert str(tmp_path) not in (tmp_path / "out" / "smelt-manifest.json").read_text()


def test_sources_of_slices_have_their_own(family: Family, tmp_path: Path) -> None:
    """Layer 1 of both models becomes layer 0: its statistics are those of layer 1."""
    paths = [save_statistics(tmp_path / f"{i}.safetensors", kinds) for i, kinds in enumerate(fishers(family))]
    sources = [
        {"model": model, "layer_range": [1, 2], "statistics": path}
        for model, path in zip(family.models[:2], paths, strict=True)
    ]
    smelt.merge({"merge_method": "fisher", "slices": [{"sources": sources}],
                 "parameters": {"normalize_fishers": False}}, tmp_path / "out")  # fmt: skip
    out = values(tmp_path / "out")
    whole = smelt.merge_tensors(
        "fisher", family.model_arrays[:2], statistics=fishers(family), parameters={"normalize_fishers": False}
    )
    name = "model.layers.{}.mlp.up_proj.weight"
    assert out[name.format(0)].tobytes() == whole[name.format(1)].tobytes()


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("dare", {"drop_rate": 0.5, "merge": "fisher"}),
        ("dare", {"drop_rate": 0.5, "merge": "regmean"}),
        ("ties", {"sign": "oracle", "density": 0.5}),
    ],
    ids=["dare-fisher", "dare-regmean", "ties-oracle"],
)
def test_other_methods_use_them_from_recipes(
    method: str, parameters: dict[str, Any], family: Family, tmp_path: Path
) -> None:
    given = statistics_for(smelt.methods.get(method), parameters, family.model_arrays[:2])
    tree = recipe(method, family.models[:2], family.base, parameters=parameters)
    for index, kinds in enumerate(given):
        tree["models"][index]["statistics"] = save_statistics(tmp_path / f"{index}.safetensors", kinds)
    smelt.merge(tree, tmp_path / "out", seed=3)
    arrays = smelt.merge_tensors(
        method, family.model_arrays[:2], family.base_arrays, parameters=parameters, statistics=given, seed=3
    )
    assert bits(values(tmp_path / "out")) == bits(arrays)


def test_one_for_all_may_stand_beside_the_base(family: Family, tmp_path: Path) -> None:
    (given,) = statistics_for(smelt.methods.get("aim"), {}, family.model_arrays[:1])
    tree = recipe("aim", [family.base, family.models[0]], family.base)
    tree["models"][0] = {"model": family.base, "statistics": save_statistics(tmp_path / "s.safetensors", given)}
    smelt.merge(tree, tmp_path / "out")
    arrays = smelt.merge_tensors("aim", family.model_arrays[:1], family.base_arrays, statistics=[given])
    assert bits(values(tmp_path / "out")) == bits(arrays)


# --- what is refused ----------------------------------------------------------------------------------------


def test_models_without_statistics_are_named(family: Family, tmp_path: Path) -> None:
    path = save_statistics(tmp_path / "s.safetensors", fishers(family)[0])
    with pytest.raises(
        UsageError, match=r"fisher needs statistics of kind fisher beside each model, .*expert1 has none"
    ):
        smelt.plan(fisher_recipe(family, path))


def test_statistics_that_nothing_uses_are_errors(family: Family, tmp_path: Path) -> None:
    path = save_statistics(tmp_path / "s.safetensors", fishers(family)[0])
    tree = recipe("linear", family.models[:2])
    tree["models"][0]["statistics"] = path
    with pytest.raises(UsageError, match=r"models\[0\].statistics: linear uses no statistics"):
        smelt.plan(tree)
    with pytest.raises(UsageError, match=r"s\.safetensors: has no effect with fisher as it is set"):
        smelt.plan(fisher_recipe(family, path, parameters={"isotropic": True}))


def test_missing_and_misshapen_tensors_are_told_at_once(family: Family, tmp_path: Path) -> None:
    first, second = fishers(family)
    del first["fisher"]["lm_head.weight"]
    second["fisher"]["model.norm.weight"] = np.ones(3, np.float32)
    paths = [save_statistics(tmp_path / f"{i}.safetensors", kinds) for i, kinds in enumerate((first, second))]
    with pytest.raises(InputRejected) as told:
        smelt.plan(fisher_recipe(family, *paths))
    missing, misfit = told.value.problems
    assert "no fisher of 1 tensor(s): 'lm_head.weight'" in missing
    assert "'fisher/model.norm.weight' is [3] for 'model.norm.weight' [64], expected [64]" in misfit


@pytest.mark.parametrize(("value", "what"), [(-1.0, "negative"), (np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf")])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
def test_impossible_values_are_named(value: float, what: str, dtype: Any) -> None:
    fisher: Arrays = {name: np.ones(array.shape, dtype) for name, array in X.items()}
    fisher["row"][2] = value
    fisher["matrix"][0, 0] = -0.0
    given: list[Given] = [{"fisher": fisher}, {"fisher": fisher}]
    message = rf"statistics of model 0: tensor 'fisher/row' holds 1 values that are .*{what}.* element 2"
    with pytest.raises(OperationFailed, match=message):
        smelt.merge_tensors("fisher", [X, Y], statistics=given, parameters={"normalize_fishers": False})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"fishr": X}], "fisher uses no statistics of kind 'fishr'"),
        ([{}, {}, {"fisher": X}], "3 dicts for 2 models"),
        ([{"fisher": X}], "beside each model, model 1 has none"),
        (None, "beside each model, model 0 has none"),
    ],
)
def test_wrong_statistics_in_memory_are_usage_errors(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        smelt.merge_tensors("fisher", [X, Y], statistics=given)


def test_a_kind_of_which_no_tensor_is_there_is_an_error() -> None:
    with pytest.raises(InputRejected, match="no tensor has a statistic of kind input_abs_mean"):
        smelt.merge_tensors("aim", [X], BASE, statistics=[{"input_abs_mean": {"other": np.ones(3, np.float32)}}])


def test_adapters_of_statistics_are_refused(family: Family) -> None:
    with pytest.raises(UsageError, match=r"an adapter on statistics is understood but not executed"):
        smelt.plan(fisher_recipe(family, "s+a", "s"))

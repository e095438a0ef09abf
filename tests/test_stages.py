"""Recipes that take each other's results: several documents, and recipes in the place of a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import smelt
from smelt.errors import InputRejected, UsageError
from tests.readback import nothing_left, stored, values
from tests.recipes import Family, make_family
from tests.small_models import CONFIG


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(tmp_path)


def documents(family: Family, first: str = "weight: 0.25") -> str:
    a, b, c = family.models
    return (
        f"name: soup\nmerge_method: linear\nmodels: [{{model: {a}, parameters: {{{first}}}}}, {{model: {b}}}]\n"
        "parameters: {weight: 0.75}\ndtype: float32\n"
        f"---\nmerge_method: slerp\nbase_model: soup\nmodels: [{{model: {c}}}]\nparameters: {{t: 0.5}}\n"
    )


def by_hand(family: Family, tmp_path: Path) -> dict[str, bytes]:
    """The same in two runs."""
    a, b, c = family.models
    models = [{"model": a, "parameters": {"weight": 0.25}}, {"model": b, "parameters": {"weight": 0.75}}]
    smelt.merge({"merge_method": "linear", "models": models, "dtype": "float32"}, tmp_path / "soup")
    base, t = str(tmp_path / "soup"), {"t": 0.5}
    smelt.merge(
        {"merge_method": "slerp", "base_model": base, "models": [{"model": c}], "parameters": t}, tmp_path / "end"
    )
    return stored(tmp_path / "end")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    return path


def test_stages_give_the_bits_of_separate_runs(family: Family, tmp_path: Path) -> None:
    out = tmp_path / "out"
    artifact = smelt.merge(write(tmp_path, documents(family)), out)
    assert stored(out) == by_hand(family, tmp_path)
    assert smelt.verify(out).ok
    assert not list(tmp_path.glob("out.*")), "the stages' results do not last"
    manifest = json.loads((out / "smelt-manifest.json").read_text())
    assert "name: soup" in manifest["recipe"]
    assert artifact.tensors == len(family.base_arrays)
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in out.iterdir()), "no local path is told"


def test_a_recipe_may_stand_in_the_place_of_a_model(family: Family, tmp_path: Path) -> None:
    a, b, c = family.models
    models = [{"model": a, "parameters": {"weight": 0.25}}, {"model": b, "parameters": {"weight": 0.75}}]
    soup = {"merge_method": "linear", "models": models, "dtype": "float32"}
    outer = {"merge_method": "slerp", "base_model": soup, "models": [{"model": c}], "parameters": {"t": 0.5}}
    smelt.merge(outer, tmp_path / "out")
    assert stored(tmp_path / "out") == by_hand(family, tmp_path)
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in (tmp_path / "out").iterdir())


def test_kept_stages_are_found_again_and_only_these(family: Family, tmp_path: Path) -> None:
    kept = tmp_path / "kept"

    def again(out: str, **change: str) -> list[str]:
        recipe = write(tmp_path, documents(family, **change))
        return smelt.merge(recipe, tmp_path / out, stages=kept).warnings

    assert not any("earlier run" in warning for warning in again("one"))
    assert any("earlier run" in warning for warning in again("two"))
    assert stored(tmp_path / "one") == stored(tmp_path / "two")
    assert not any("earlier run" in warning for warning in again("three", first="weight: 0.5"))
    (tmp_path / "expert0" / "model.safetensors").touch()
    assert not any("earlier run" in warning for warning in again("four"))
    assert len(list(kept.iterdir())) == 3


def test_all_stages_are_checked_before_the_first_runs(family: Family, tmp_path: Path) -> None:
    text = documents(family).replace("t: 0.5", "u: 0.5")
    with pytest.raises(UsageError, match=r"recipe\.yml:\d+:\d+: slerp has no parameter 'u'"):
        smelt.merge(write(tmp_path, text), tmp_path / "out", stages=tmp_path / "kept")
    assert nothing_left(tmp_path / "out")
    assert not (tmp_path / "kept").exists()


def test_a_plan_holds_the_plans_of_its_stages(family: Family, tmp_path: Path) -> None:
    plan = smelt.plan(write(tmp_path, documents(family)))
    (soup,) = plan.stages
    assert {output.dtype for output in soup.outputs} == {"F32"}
    assert {output.dtype for output in plan.outputs} == {"F32"}
    assert plan.disk_needed > soup.disk_needed
    assert plan.as_dict()["stages"][0]["method"] == "linear"
    plan.close()


def test_a_later_stage_sees_the_depth_of_an_earlier_one(family: Family, tmp_path: Path) -> None:
    a = family.models[0]
    text = (
        f"name: deep\nmerge_method: passthrough\nslices: [{{sources: [{{model: {a}, layer_range: [0, 2]}}]}}, "
        f"{{sources: [{{model: {a}, layer_range: [1, 2]}}]}}]\n---\nmerge_method: passthrough\n"
        "slices: [{sources: [{model: deep, layer_range: [1, 3]}]}]\n"
    )
    out = tmp_path / "out"
    smelt.merge(write(tmp_path, text), out)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == CONFIG["num_hidden_layers"]
    found, wanted = values(out), family.model_arrays[0]
    for layer in (0, 1):
        name = "model.layers.{}.mlp.up_proj.weight"
        np.testing.assert_array_equal(found[name.format(layer)], wanted[name.format(1)])


def test_models_in_memory_take_part_by_name(family: Family, tmp_path: Path) -> None:
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("first", family.models[1])]
    recipe = {"merge_method": "linear", "models": models}
    smelt.merge(recipe, tmp_path / "out", models={"first": family.model_arrays[0]})
    paths = [{"model": path, "parameters": {"weight": 1}} for path in family.models[:2]]
    smelt.merge({"merge_method": "linear", "models": paths}, tmp_path / "same")
    assert stored(tmp_path / "out") == stored(tmp_path / "same")
    with pytest.raises(UsageError, match="the recipe names no model 'other'"):
        smelt.merge(recipe, tmp_path / "no", models={"other": {}})


def test_raw_tensors_have_no_ties_and_may_be_united(tmp_path: Path) -> None:
    """As mergekit-pytorch with -u: the method runs on those that have the tensor."""
    x, y = np.ones((2, 2), np.float32), np.full((2, 2), 3, np.float32)
    models = {"a": {"head.weight": x, "w": x}, "b": {"w": y}, "c": {"head.weight": y, "w": y}}
    entries = [{"model": name, "parameters": {"weight": 1}} for name in models]
    recipe = {"merge_method": "linear", "models": entries}
    smelt.merge(recipe, tmp_path / "out", models=models, raw=True, on_extra="merge", force=True)
    assert values(tmp_path / "out")["head.weight"][0, 0] == 2
    slerp = {"merge_method": "slerp", "base_model": "b", "models": [{"model": "a"}], "parameters": {"t": 0.5}}
    smelt.merge(slerp, tmp_path / "copied", models={k: models[k] for k in "ab"}, on_extra="merge", force=True)
    assert values(tmp_path / "copied")["head.weight"][0, 0] == 1
    with pytest.raises(InputRejected, match="is in a, c but not in b: choose --on-extra copy, merge or drop"):
        smelt.plan(recipe, models=models, raw=True)

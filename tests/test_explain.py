"""`smelt explain`: what each parameter is for which layers and tensors, and what filters match."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import smelt
from smelt.cli import main
from smelt.engine.explain import Explanation, explain
from tests.families import FAMILIES, write


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    return [write(tmp_path / f"m{seed}", FAMILIES["llama"], seed) for seed in range(3)]


def explained(recipe: dict[str, Any], **options: Any) -> Explanation:
    plan = smelt.plan(recipe, **options)
    plan.close()
    return explain(plan)


def recipe(models: list[str], weight: Any, **more: Any) -> dict[str, Any]:
    first = {"model": models[1], "parameters": {"weight": weight}}
    return {"merge_method": "task_arithmetic", "base_model": models[0],
            "models": [first, {"model": models[2], "parameters": {"weight": 1}}], **more}  # fmt: skip


def test_one_value_is_one_row(models: list[str]) -> None:
    found = explained(recipe(models, 0.5))
    assert found.models == tuple(models[1:])
    assert found.constant["weight"] == [0.5, 1]
    assert [(row.where, row.tensors, row.action) for row in found.rows] == [
        ("", ("*",), "merge"), ("model.layers 0-2", ("*",), "merge")
    ]  # fmt: skip


def test_gradients_and_filters_are_shown_where_they_hold(models: list[str]) -> None:
    weight = [{"filter": "mlp", "value": [0, 1]}, {"value": 0.25}]
    rows = explained(recipe(models, weight, only=["mlp", "norm"])).rows
    merged = {(row.where, row.tensors): row.values["weight"] for row in rows if row.action == "merge"}
    mlp, norms = (
        ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"),
        ("input_layernorm", "post_attention_layernorm"),
    )
    assert merged == {
        ("", ("model.norm",)): [0.25, 1], ("model.layers 0-2", norms): [0.25, 1],
        ("model.layers 0", mlp): [0.0, 1], ("model.layers 1", mlp): [0.5, 1], ("model.layers 2", mlp): [1.0, 1],
    }  # fmt: skip
    kept = [row for row in rows if row.action == "copy (not chosen by only)"]
    assert {row.where for row in kept} == {"", "model.layers 0-2"}


def test_experts_are_one_row(tmp_path: Path) -> None:
    model = write(tmp_path / "m", FAMILIES["mixtral"], 1)
    entries = [{"model": model, "parameters": {"scale": {"filter": "experts", "value": 2}}}]
    rows = explained({"merge_method": "passthrough", "models": entries}).rows
    assert any("block_sparse_moe.experts.*.w1" in row.tensors for row in rows)


def test_the_command_shows_filters_and_stages(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yml"
    text = (
        f"name: first\nmerge_method: linear\nmodels: [{{model: {models[0]}}}, {{model: {models[1]}}}]\n"
        "parameters: {weight: [{filter: self_atn, value: 1}, {value: 2}]}\n---\n"
        "merge_method: passthrough\nmodels: [{model: first, parameters: {scale: [1, 2]}}]\n"
    )
    path.write_text(text)
    assert main(["explain", str(path)]) == 0
    captured = capsys.readouterr()
    assert "model.layers 1" in captured.out
    assert "self_atn  " in captured.out
    assert "filter 'self_atn' matches no tensor" in captured.err
    assert main(["explain", str(path), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["method"], second["models"]) == ("linear", ["first"])
    assert first["filters"][0]["tensors"] == []

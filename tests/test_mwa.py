"""Metrics-weighted averaging: how weights follow from metrics, and where the metrics come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.errors import InputRejected, SmeltError, UsageError
from smelt.methods.mwa import metric_weights
from tests.readback import values
from tests.recipes import Family, recipe
from tests.tensors import X, Y, Z, bits

LOSSES = (2.1, 1.9, 2.0)
WEIGHTINGS = ("power", "softmax", "linear_penalty")


# --- weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["loss", "steps", "score"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_shares_that_follow_the_metric(metric: str, weighting: str) -> None:
    weights = metric_weights(LOSSES, metric=metric, weighting=weighting, penalty=0.9)
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    assert min(weights) >= 0
    order = sorted(range(3), key=lambda i: weights[i], reverse=metric == "loss")
    assert order == [1, 2, 0]
    turned = metric_weights(LOSSES[::-1], metric=metric, weighting=weighting, penalty=0.9)
    assert turned[::-1] == weights


def test_each_weighting_has_its_symmetry() -> None:
    power = metric_weights(LOSSES, penalty=3)
    assert metric_weights([7 * loss for loss in LOSSES], penalty=3) == pytest.approx(power, abs=1e-12)
    soft = metric_weights(LOSSES, weighting="softmax", penalty=3)
    moved = metric_weights([7 * loss - 40 for loss in LOSSES], weighting="softmax", penalty=3)
    assert moved == pytest.approx(soft, abs=1e-12)


def test_a_large_penalty_leaves_the_best_and_a_penalty_near_one_drops_the_worst() -> None:
    assert metric_weights(LOSSES, penalty=1e5) == pytest.approx((0, 1, 0))
    assert metric_weights(LOSSES, weighting="softmax", penalty=1e3) == pytest.approx((0, 1, 0))
    assert metric_weights(LOSSES, weighting="linear_penalty", penalty=1 - 1e-9)[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("losses", "penalty"), [((2.5, 2.5, 2.5), 3.0), (LOSSES, 0.0)])
def test_even_weights_are_the_plain_mean_bit_for_bit(losses: tuple[float, ...], penalty: float) -> None:
    out = smelt.merge_tensors("mwa", [X, Y, Z], parameters={"penalty": penalty}, per_model={"value": losses})
    assert bits(out) == bits(smelt.merge_tensors("linear", [X, Y, Z]))


def test_the_merge_is_the_mean_with_these_weights() -> None:
    out = smelt.merge_tensors("mwa", [X, Y, Z], parameters={"penalty": 8.0}, per_model={"value": LOSSES})
    wanted = np.average([m["matrix"] for m in (X, Y, Z)], axis=0, weights=metric_weights(LOSSES, penalty=8.0))
    np.testing.assert_allclose(out["matrix"], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"value": 0.0}, "weighting: power needs a loss above 0, found 0.0: use weighting: softmax"),
        ({"value": 1.0, "weighting": "linear_penalty"}, "needs a penalty below 1, not 1.0"),
        ({}, "value is required for each model"),
        ({"value": 1.0, "metrics": "file"}, "value has no effect with metrics: file"),
        ({"value": 1.0, "key": "eval_loss"}, "key has no effect with metrics: recipe"),
        ({"value": 1.0, "penalty": -1.0}, r"penalty must lie in \[0, inf\)"),
    ],
)
def test_wrong_parameters_are_usage_errors(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        smelt.merge_tensors("mwa", [X, Y], parameters=parameters)


# --- metrics in files -----------------------------------------------------------------------------------

STATE = {
    "best_metric": 0.5, "global_step": 20,
    "log_history": [
        {"step": 10, "loss": 3.0}, {"step": 10, "eval_loss": 2.5},
        {"step": 20, "loss": 2.0}, {"step": 20, "eval_loss": 1.5}, {"step": 30, "loss": 1.0},
    ],
}  # fmt: skip


@pytest.fixture
def run(family: Family, tmp_path: Path) -> list[str]:
    """Two checkpoints of a run, the second with lower losses."""
    paths = []
    for index, model in enumerate(family.models[:2]):
        path = tmp_path / f"checkpoint-{index}"
        shutil.copytree(model, path)
        logged = [
            {**entry, **{key: entry[key] / (index + 1) for key in entry if "loss" in key}}
            for entry in STATE["log_history"]  # type: ignore[attr-defined]
        ]
        (path / "trainer_state.json").write_text(json.dumps({**STATE, "log_history": logged}))
        paths.append(str(path))
    return paths


def merged(run: list[str], out: Path, **parameters: Any) -> dict[str, Any]:
    """Merge; returns the manifest."""
    smelt.merge(recipe("mwa", run, parameters=parameters), out)
    manifest: dict[str, Any] = json.loads((out / "smelt-manifest.json").read_text())
    return manifest


@pytest.mark.parametrize(
    ("parameters", "first"),
    [
        ({}, 2.0),
        ({"key": "eval_loss"}, 1.5),
        ({"key": "eval_loss", "window": 2}, 2.0),
        ({"window": 10}, 2.5),
        ({"metric": "steps"}, 20.0),
        ({"metric": "score", "key": "best_metric"}, 0.5),
    ],
)
def test_the_trainers_state_gives_the_metric(
    parameters: dict[str, Any], first: float, run: list[str], tmp_path: Path
) -> None:
    manifest = merged(run, tmp_path / "out", metrics="trainer_state", **parameters)
    second = first / 2 if parameters.get("metric", "loss") == "loss" else first
    assert manifest["measured"] == [
        {"model": "checkpoint-0", "value": first},
        {"model": "checkpoint-1", "value": second},
    ]


def test_numbers_from_files_merge_as_numbers_in_the_recipe(run: list[str], tmp_path: Path) -> None:
    merged(run, tmp_path / "state", metrics="trainer_state", penalty=2.0)
    entries = [{"model": path, "parameters": {"value": value}} for path, value in zip(run, (2.0, 1.0), strict=True)]
    tree = {"merge_method": "mwa", "models": entries, "parameters": {"penalty": 2.0}}
    smelt.merge(tree, tmp_path / "recipe")
    assert bits(values(tmp_path / "state")) == bits(values(tmp_path / "recipe"))
    assert json.loads((tmp_path / "recipe" / "smelt-manifest.json").read_text())["measured"] == []


@pytest.mark.parametrize(("entry", "key"), [(1.0, ""), ({"eval_loss": 1.0, "loss": 9.0}, "eval_loss")])
def test_a_file_gives_the_metric_and_its_path_stays_private(
    entry: Any, key: str, run: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps({run[0]: 2.0 if not key else {key: 2.0}, "checkpoint-1": entry}))
    manifest = merged(run, tmp_path / "out", metrics="file", metrics_file=str(file), **({"key": key} if key else {}))
    assert [found["value"] for found in manifest["measured"]] == [2.0, 1.0]
    assert str(tmp_path) not in json.dumps(manifest)
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("parameters", "content", "message"),
    [
        (
            {"key": "eval_acc"},
            None,
            r"trainer_state.json.*: 'eval_acc' was not logged; logged were 'eval_loss', 'loss'",
        ),
        ({"metric": "score"}, None, "metric: score needs key"),
        ({"metric": "steps", "window": 2}, None, "window has no effect with key: global_step"),
        ({}, {"checkpoint-0": 1.0}, "metrics.json.* has no entry for .*checkpoint-1"),
        ({}, {"checkpoint-0": 1.0, "checkpoint-1": "low"}, "'checkpoint-1' is 'low', expected a finite number"),
        ({}, {"checkpoint-0": float("nan"), "checkpoint-1": 1.0}, "'checkpoint-0' is nan, expected a finite number"),
        ({"key": "a"}, {"checkpoint-0": 1.0}, "'checkpoint-0' is 1.0: there is no 'a' to look up"),
        ({"key": "a"}, {"checkpoint-0": {"b": 1.0}}, "'checkpoint-0' has no 'a', only 'b'"),
    ],
)
def test_what_a_file_does_not_hold_is_told_before_a_weight_is_read(
    parameters: dict[str, Any], content: Any, message: str, run: list[str], tmp_path: Path
) -> None:
    where: dict[str, Any] = {"metrics": "trainer_state"}
    if content is not None:
        (tmp_path / "metrics.json").write_text(json.dumps(content))
        where = {"metrics": "file", "metrics_file": str(tmp_path / "metrics.json")}
    with pytest.raises(SmeltError, match=message):
        smelt.plan(recipe("mwa", run, parameters={**where, **parameters}))


def test_a_checkpoint_without_a_state_and_a_forgotten_file_are_told(family: Family) -> None:
    with pytest.raises(
        InputRejected, match=r"no trainer_state.json beside the weights: give the numbers in the recipe"
    ):
        smelt.plan(recipe("mwa", family.models[:2], parameters={"metrics": "trainer_state"}))
    with pytest.raises(UsageError, match="metrics: file needs metrics_file"):
        smelt.plan(recipe("mwa", family.models[:2], parameters={"metrics": "file"}))

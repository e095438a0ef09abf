"""Choices by a score: soups and mask densities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.errors import OperationFailed, UsageError
from tests.recipes import Family
from tests.small_models import Arrays
from tests.tensors import BASE, X, Y, Z, bits

MODELS = [X, Y, Z]


def near(target: Arrays) -> Any:
    return lambda model: -sum(float(np.square(np.float64(model[n]) - target[n]).sum()) for n in target)


def test_a_soup_is_the_mean_of_what_helped_in_the_order_in_which_it_joined() -> None:
    target = {name: (X[name] + Z[name]) / 2 for name in X}
    soup = smelt.greedy_soup(MODELS, near(target))
    assert set(soup.chosen) == {0, 2}
    assert soup.scores[soup.chosen[0]] == max(soup.scores)
    assert soup.score > max(soup.scores)
    assert bits(soup.model) == bits(smelt.merge_tensors("linear", [MODELS[index] for index in soup.chosen]))


def test_of_equally_good_models_the_last_comes_first_and_no_other_joins() -> None:
    assert smelt.greedy_soup(MODELS, lambda model: 1.0).chosen == (2,)


def test_a_soup_must_gain_more_than_the_tolerance() -> None:
    scores = iter([3.0, 2.0, 1.0, 3.5, 3.6])
    soup = smelt.greedy_soup(MODELS, lambda model: next(scores), tolerance=0.5)
    assert (soup.chosen, soup.score, soup.scores) == ((0, 2), 3.6, (3.0, 2.0, 1.0))


def test_soups_of_folders_and_of_arrays_agree(family: Family, tmp_path: Path) -> None:
    """And nothing is left of the candidates."""
    target = {name: (a + b) / 2 for (name, a), b in
              zip(family.model_arrays[0].items(), family.model_arrays[1].values(), strict=True)}  # fmt: skip
    out = tmp_path / "soup"
    before = set(tmp_path.iterdir())
    on_disk = smelt.greedy_soup(family.models, lambda path: near(target)(smelt.load(path)), out, threads=1)
    in_memory = smelt.greedy_soup(family.model_arrays, near(target))
    assert on_disk.chosen == in_memory.chosen
    assert on_disk.model == out
    assert bits(dict(smelt.load(out))) == bits(in_memory.model)
    assert set(tmp_path.iterdir()) - before == {out}
    assert smelt.verify(out).ok


def test_soups_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one model"):
        smelt.greedy_soup([], near(X))
    with pytest.raises(UsageError, match="needs out"):
        smelt.greedy_soup(["a", "b"], near(X))
    with pytest.raises(OperationFailed, match="score of model 0 is NaN"):
        smelt.greedy_soup(MODELS, lambda model: float("nan"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match="not empty"):
        smelt.greedy_soup(["a", "b"], near(X), tmp_path / "full")


def test_each_task_gets_its_best_lambda_and_the_first_of_equals() -> None:
    seen: list[tuple[int, Arrays]] = []

    def score(task: int, model: Arrays) -> float:
        seen.append((task, model))
        return [0, 1, 1][(len(seen) - 1) % 3] if task else -float(np.abs(model["matrix"] - BASE["matrix"]).sum())

    chosen = smelt.choose_lambdas(MODELS, BASE, score, grid=(0.2, 0.4, 0.6))
    assert chosen == [0.6, 0.4, 0.4]
    direct = smelt.merge_tensors("tall_masks", MODELS, BASE, parameters={"task": 1, "lambda": 0.4})
    assert seen[4][0] == 1
    assert bits(seen[4][1]) == bits(direct)

"""Choices by a validation score: which models go into a soup, how dense a task's mask is.

Whoever calls brings the score, a function of a model; here are the orders in which the papers try.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import storage
from ..errors import OperationFailed, UsageError
from .memory import merge_tensors
from .publish import check_destination
from .run import merge

Arrays = Mapping[str, Any]


@dataclass(frozen=True)
class Soup:
    """What :func:`greedy_soup` made.

    Attributes
    ----------
    model: the merged dict, or the folder that was written.
    chosen: the ingredients' indices, in the order in which they joined.
    score: of the soup; scores: of each model alone.
    """

    model: Any
    chosen: tuple[int, ...]
    score: float
    scores: tuple[float, ...]


def greedy_soup(
    models: Sequence[Arrays] | Sequence[str | Path], score: Callable[[Any], float], out: str | Path | None = None, *,
    tolerance: float = 0.0, **options: Any,
) -> Soup:  # fmt: skip
    """Average models one by one, from the best down, keeping each only if the score rises.

    Parameters
    ----------
    models: dicts of arrays, or folders (or hub ids); then each candidate is written beside ``out``, scored, removed.
    score: called with a dict, or with the path of a folder; larger is better.
    out: the folder to write, for folders.
    tolerance: by how much the score has to rise: more than this.
    options: as :func:`smelt.merge_tensors`, or :func:`smelt.merge` for folders.

    Models of the same score are tried last index first. Wortsman et al., "Model soups", ICML 2022, recipe 1; their
    code asks for a strictly better score where the paper allows an equal one. Every candidate is averaged anew in
    fp32 from its ingredients. Raises UsageError where no model is given, OperationFailed
    where a score is NaN.
    """
    if not models:
        raise UsageError("greedy_soup needs at least one model")
    in_memory = isinstance(models[0], Mapping)
    kitchen = _Dicts(models, score, options) if in_memory else _Folders(models, score, out, options)
    scores = [kitchen.score([index]) for index in range(len(models))]
    order = sorted(range(len(models)), key=lambda index: (scores[index], index), reverse=True)
    chosen, best = order[:1], scores[order[0]]
    for index in order[1:]:
        found = kitchen.score([*chosen, index])
        if found > best + tolerance:
            chosen, best = [*chosen, index], found
    return Soup(kitchen.serve(chosen), tuple(chosen), best, tuple(scores))


class _Dicts:
    """Models in memory."""

    def __init__(self, models: Sequence[Any], score: Callable[[Any], float], options: Mapping[str, Any]) -> None:
        self._models, self._score, self._options = models, score, options

    def score(self, chosen: Sequence[int]) -> float:
        alone = self._models[chosen[0]]
        return _number(self._score(alone if len(chosen) == 1 else self.serve(chosen)), chosen)

    def serve(self, chosen: Sequence[int]) -> dict[str, Any]:
        return merge_tensors("linear", [self._models[index] for index in chosen], **self._options)


class _Folders:
    """Models on disk."""

    def __init__(
        self, models: Sequence[Any], score: Callable[[Any], float], out: str | Path | None, options: Mapping[str, Any]
    ) -> None:
        if out is None:
            raise UsageError("greedy_soup of folders needs out: the folder to write")
        self._models, self._score, self._out, self._options = models, score, Path(out), options
        check_destination(self._out, [])

    def score(self, chosen: Sequence[int]) -> float:
        if len(chosen) == 1:
            return _number(self._score(self._models[chosen[0]]), chosen)
        candidate = self._out.with_name(f"{self._out.name}.smelt-{secrets.token_hex(4)}")
        try:
            return _number(self._score(merge(self._recipe(chosen), candidate, **self._options).path), chosen)
        finally:
            storage.remove_tree(candidate)

    def serve(self, chosen: Sequence[int]) -> Path:
        return merge(self._recipe(chosen), self._out, **self._options).path

    def _recipe(self, chosen: Sequence[int]) -> dict[str, Any]:
        inputs = [{"model": str(self._models[index]), "parameters": {"weight": 1.0}} for index in chosen]
        return {"merge_method": "linear", "models": inputs}


def choose_lambdas(
    models: Sequence[Arrays], base: Arrays, score: Callable[[int, dict[str, Any]], float], *,
    grid: Sequence[float] = (0.2, 0.3, 0.4, 0.5, 0.6), **options: Any,
) -> list[float]:  # fmt: skip
    """For each task the ``lambda`` of ``tall_masks`` whose model scores best; the first of equally good ones.

    Parameters
    ----------
    models, base: dicts of arrays.
    score: called with a task's index and its model made with one value of the grid; larger is better.
    grid: the values, tried in this order for one task after the other.
    options: as :func:`smelt.merge_tensors`.
    """
    parameters = options.pop("parameters", {})

    def score_of(task: int, value: float) -> float:
        given = {**parameters, "task": task, "lambda": value}
        return _number(score(task, merge_tensors("tall_masks", models, base, parameters=given, **options)), [task])

    return [max(grid, key=lambda value: score_of(task, value)) for task in range(len(models))]


def _number(score: float, chosen: Sequence[int]) -> float:
    if math.isnan(score):
        raise OperationFailed(f"the score of model {', '.join(map(str, chosen))} is NaN: it must be a number")
    return score

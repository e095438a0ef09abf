"""Which method and parameters to start with, and why: rules of thumb from the methods' papers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .scale import CONTINUED, ORDINARY
from .survey import Survey

SAME_WAY = 0.5  # mean cosine above which task vectors say the same thing
INTERFERING = 0.3  # share of conflicting signs above which several models call for an election
OPPOSING = -0.1  # mean cosine below which even two do


@dataclass(frozen=True)
class Advice:
    """``recipe`` is YAML that ``smelt merge`` runs; ``alternatives`` are worth a try, with the reason."""

    method: str
    recipe: str
    reasons: tuple[str, ...]
    alternatives: tuple[tuple[str, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "reasons": list(self.reasons), "alternatives": dict(self.alternatives)}


@dataclass(frozen=True)
class _Facts:
    """The numbers that decide."""

    models: tuple[str, ...]
    base: str
    p99: float
    cosine: float
    conflict: float
    longest: float  # length of the longest task vector over that of the shortest


def advise_average(models: Sequence[str], dtype: str) -> Advice | None:
    """Without a base nothing is known about task vectors; the mean is what remains."""
    if len(models) < 2:
        return None
    reasons = ("no base is known, so there are no task vectors to work on",)
    slerp = (("slerp", "t 0.5, for two models"),) if len(models) == 2 else ()
    return Advice("linear", _recipe("linear", models, None, {"weight": 1.0}, dtype), reasons, slerp)


def advise(survey: Survey, skipped: Collection[int], dtype: str) -> Advice | None:
    """A recipe for the models of ``survey`` but for those at ``skipped`` (duplicates, the base itself)."""
    kept = [i for i in range(len(survey.models)) if i not in skipped]
    if not kept:
        return None
    facts = _gather(survey, kept)
    choose = _one if len(kept) == 1 else _several
    method, parameters, reasons = choose(facts)
    return Advice(
        method,
        _recipe(method, facts.models, None if method == "linear" else facts.base, parameters, dtype),
        (*reasons, *_balance(facts)),
        tuple(_alternatives(facts, method)),
    )


def _gather(survey: Survey, kept: Sequence[int]) -> _Facts:
    total = survey.total
    pairs = [(i, j) for i, j in survey.pairs if i in kept and j in kept]
    norms = [total.norm(i) for i in kept]
    return _Facts(
        models=tuple(survey.models[i] for i in kept),
        base=survey.base,
        p99=max(total.quantile(i, 0.99) for i in kept),
        cosine=_mean([total.cosine(i, j) for i, j in pairs]),
        conflict=_mean([total.conflict(i, j) for i, j in pairs]),
        longest=max(norms) / min(norms) if min(norms) > 0 else float("inf"),
    )


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else 0.0


_Choice = tuple[str, dict[str, float], tuple[str, ...]]


def _one(facts: _Facts) -> _Choice:
    reason = "one model and its base: the weight goes from the base (0) to the model (1), and often gains between"
    return "task_arithmetic", {"weight": 0.8}, (reason,)


def _several(facts: _Facts) -> _Choice:
    size, cosine, conflict = len(facts.models), f"{facts.cosine:.2f}", f"{facts.conflict:.0%}"
    if facts.cosine > SAME_WAY:
        reason = f"the task vectors point the same way (mean cosine {cosine}): average them"
        return "linear", {"weight": 1.0}, (reason,)
    if facts.p99 > CONTINUED:
        reason = f"large task vectors (99 % of |delta| up to {facts.p99:.3g}) are better averaged than thinned"
        return "linear", {"weight": 1.0}, (reason,)
    if facts.cosine < OPPOSING or (size > 2 and facts.conflict > INTERFERING):
        reason = f"{conflict} of the signs conflict among {size} models (mean cosine {cosine}): trim and elect"
        return "ties", {"weight": 1.0, "density": 0.2}, (reason,)
    weight = round(1 / np.sqrt(size), 2)
    reason = (
        f"the task vectors hardly touch (mean cosine {cosine}): add them; weight {weight:g} = 1/sqrt({size}) "
        f"keeps the sum as long as one of them"
    )
    return "task_arithmetic", {"weight": float(weight)}, (reason,)


def _balance(facts: _Facts) -> list[str]:
    if facts.longest < 3 or facts.longest == float("inf"):
        return []
    longest = f"the longest task vector is {facts.longest:.1f} times the shortest"
    return [f"{longest} and will dominate: lower its weight"]


def _alternatives(facts: _Facts, chosen: str) -> list[tuple[str, str]]:
    if len(facts.models) < 2:
        return []
    large = facts.p99 > CONTINUED
    found = [
        ("ties", "density 0.9 or more" if large else "density 0.2, where the sum loses abilities"),
        ("task_arithmetic", f"weight {1 / np.sqrt(len(facts.models)):.2g}"),
    ]
    if facts.p99 <= ORDINARY:
        found.append(("dare_ties", f"density 0.5: ordinary fine-tunes (99 % of |delta| up to {facts.p99:.2g})"))
    return [(method, why) for method, why in found if method != chosen]


def _recipe(method: str, models: Sequence[str], base: str | None, parameters: dict[str, float], dtype: str) -> str:
    import yaml

    tree: dict[str, Any] = {"merge_method": method}
    if base is not None:
        tree["base_model"] = base
    tree["models"] = [{"model": label, "parameters": dict(parameters)} for label in models]
    tree["dtype"] = dtype
    return yaml.safe_dump(tree, sort_keys=False)

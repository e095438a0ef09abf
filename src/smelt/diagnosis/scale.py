"""What the size and direction of the task vectors mean for a merge.

DARE (Yu et al., ICML 2024, section 4) observed that supervised fine-tunes change weights by up to about
0.005, of which most can be dropped, and continued pre-training by up to about 0.03, where dropping breaks
the model.
"""

from __future__ import annotations

from collections.abc import Collection

from ..engine.findings import Finding
from ..errors import show
from .survey import Survey

ORDINARY, CONTINUED = 0.005, 0.01  # 99th percentile of |delta|
OPPOSED = -0.5  # cosine between task vectors


def judge_vectors(survey: Survey, strangers: Collection[str]) -> list[Finding]:
    """Errors for values that are no numbers, warnings for task vectors that call for care.

    The ``strangers`` have another backbone, so the size and direction of their differences mean nothing.
    """
    models = range(len(survey.models))
    kin = [i for i in models if survey.models[i] not in strangers]
    return [
        *(finding for i in models for finding in _nonfinite(survey, i)),
        *(finding for i in kin for finding in _large(survey, i)),
        *(finding for i, j in survey.pairs if i in kin and j in kin for finding in _opposed(survey, i, j)),
    ]


def _nonfinite(survey: Survey, model: int) -> list[Finding]:
    count = int(survey.total.nonfinite[model])
    if not count:
        return []
    label = survey.models[model]
    text = f"{show(label)} (or the base) holds NaN or Inf in {count} of the {survey.total.read} elements read"
    return [Finding("error", "nonfinite", (label,), text, {"elements": count})]


def _large(survey: Survey, model: int) -> list[Finding]:
    p99 = survey.total.quantile(model, 0.99)
    if not p99 > CONTINUED:
        return []
    label = survey.models[model]
    text = (
        f"{show(label)} differs from the base as after continued pre-training (99 % of |delta| up to "
        f"{p99:.3g}, fine-tunes stay below {ORDINARY}): do not drop more than 10 % of it"
    )
    return [Finding("warning", "large-delta", (label,), text, {"p99": p99})]


def _opposed(survey: Survey, i: int, j: int) -> list[Finding]:
    cosine, conflict = survey.total.cosine(i, j), survey.total.conflict(i, j)
    if not cosine < OPPOSED:
        return []
    a, b = survey.models[i], survey.models[j]
    text = (
        f"{show(a)} and {show(b)} pull in opposite directions (cosine {cosine:.2f}, {conflict:.0%} of the "
        f"signs conflict): merged they cancel"
    )
    return [Finding("warning", "opposed", (a, b), text, {"cosine": cosine, "conflict": conflict})]

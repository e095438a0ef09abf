"""Which of several checkpoints do the others look fine-tuned from?

Seen from the true base, the other models lie nearest and their task vectors are nearly at right angles.
Seen from a sibling, every other task vector contains minus the sibling's own, so they agree by half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np

from ..engine.backbone import Likeness
from ..engine.findings import Finding
from ..errors import show

#: Task vectors that agree more than this are those of siblings seen from a sibling (which gives 0.5).
MOST_AGREEMENT = 0.3
#: A candidate is told to fit better than the base given when it is nearer by this factor.
NEARER = 0.8


@dataclass(frozen=True)
class Candidate:
    """One checkpoint tried as the base. ``distance``: mean norm(delta)/norm(base) of the others;
    ``agreement``: mean cosine between the others' task vectors (NaN with fewer than two others)."""

    label: str
    distance: float
    agreement: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def candidates(likeness: Likeness) -> list[Candidate]:
    """Every checkpoint tried as the base of all others, nearest first."""
    tried = [_try(likeness, index) for index in range(len(likeness.labels))]
    return sorted(tried, key=lambda candidate: candidate.distance)


def _try(likeness: Likeness, base: int) -> Candidate:
    others = [i for i in range(len(likeness.labels)) if i != base]
    distance = float(np.mean([likeness.ratio(i, base) for i in others]))
    cosines = [likeness.delta_cosine(i, j, base) for i in others for j in others if i < j]
    known = [cosine for cosine in cosines if cosine == cosine]
    return Candidate(likeness.labels[base], distance, float(np.mean(known)) if known else float("nan"))


def likely_base(tried: Sequence[Candidate]) -> str | None:
    """The label of the base among siblings, or None when it is not there or cannot be told."""
    if len(tried) < 3:
        return None
    best = tried[0]
    return best.label if best.agreement < MOST_AGREEMENT else None


def judge_base(tried: Sequence[Candidate], given: str | None) -> list[Finding]:
    """What to say about the choice of base; nothing without candidates."""
    if not tried:
        return []
    best = likely_base(tried)
    facts = {"candidates": [candidate.as_dict() for candidate in tried]}
    if given is None:
        return [_no_base(tried, best, facts)]
    distance = next((candidate.distance for candidate in tried if candidate.label == given), float("inf"))
    if best is None or best == given or not tried[0].distance < NEARER * distance:
        return []
    text = (
        f"{show(best)} fits better as the base than {show(given)}: the others differ from it by "
        f"{tried[0].distance:.3f} of its norm"
        + (f", from {show(given)} by {distance:.3f}" if isfinite(distance) else "")
    )
    return [Finding("warning", "better-base", (best, given), text, facts)]


def _no_base(tried: Sequence[Candidate], best: str | None, facts: dict[str, Any]) -> Finding:
    labels = tuple(candidate.label for candidate in tried)
    if best is not None:
        text = f"no base was given: {show(best)} fits as the base of the others and is taken for it"
        return Finding("note", "likely-base", (best,), text, facts)
    why = "two models alone cannot tell" if len(labels) < 3 else "none of the models looks like the others' base"
    text = f"no base was given, and {why}: name it with --base to learn about task vectors"
    return Finding("note", "no-base", labels, text, facts)

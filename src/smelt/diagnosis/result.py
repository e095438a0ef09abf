"""What a check found, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..engine.findings import Finding
from .advise import Advice
from .bases import Candidate
from .survey import Survey
from .vectors import TaskVectors

#: What the numbers mean, for whoever reads the JSON.
CONVENTIONS = {
    "delta": "model - base, element by element",
    "quantiles": "of |delta| over all elements read, to within 0.8 %",
    "zeros": "share of the elements that equal the base's",
    "conflict": "share of the elements changed by both models whose changes have opposite signs",
}


@dataclass(frozen=True)
class ModelRow:
    """One model's task vector. Magnitudes are of |delta|, ``ratio`` is norm(delta)/norm(base)."""

    model: str
    ratio: float
    p50: float
    p99: float
    largest: float
    zeros: float


@dataclass(frozen=True)
class PairRow:
    """Two task vectors. ``conflict``: of the elements that both change, the share with opposite signs."""

    a: str
    b: str
    cosine: float
    conflict: float


@dataclass(frozen=True)
class LayerRow:
    """The same numbers for one layer (or another part of the model)."""

    layer: str
    models: tuple[ModelRow, ...]
    pairs: tuple[PairRow, ...]


@dataclass(frozen=True)
class Diagnosis:
    """The whole answer. ``base`` may have been found rather than given; ``share_read`` is the part of the
    elements that the task vectors' numbers rest on (0 when there is no base)."""

    models: tuple[str, ...]
    base: str | None
    findings: tuple[Finding, ...]
    candidates: tuple[Candidate, ...] = ()
    overall: LayerRow | None = None
    layers: tuple[LayerRow, ...] = ()
    tensors: int = 0
    share_read: float = 0.0
    advice: Advice | None = None

    @property
    def mergeable(self) -> bool:
        """No finding forbids a merge."""
        return all(finding.severity != "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain data; NaN stands for what cannot be said (the cosine of a zero task vector)."""
        return {
            "mergeable": self.mergeable,
            "models": list(self.models),
            "base": self.base,
            "findings": [finding.as_dict() for finding in self.findings],
            "candidates": [candidate.as_dict() for candidate in self.candidates],
            "tensors": self.tensors,
            "share_read": self.share_read,
            "overall": None if self.overall is None else asdict(self.overall),
            "layers": [asdict(row) for row in self.layers],
            "advice": None if self.advice is None else self.advice.as_dict(),
            "conventions": CONVENTIONS,
        }


def row_of(layer: str, vectors: TaskVectors, survey: Survey) -> LayerRow:
    """The numbers of one group of tensors."""
    return LayerRow(
        layer,
        tuple(_model_row(label, vectors, index) for index, label in enumerate(survey.models)),
        tuple(
            PairRow(survey.models[i], survey.models[j], vectors.cosine(i, j), vectors.conflict(i, j))
            for i, j in survey.pairs
        ),
    )


def _model_row(label: str, vectors: TaskVectors, index: int) -> ModelRow:
    p50, p99 = (vectors.quantile(index, share) for share in (0.5, 0.99))
    return ModelRow(label, vectors.ratio(index), p50, p99, float(vectors.largest[index]), vectors.zeros(index))

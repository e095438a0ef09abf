"""What a comparison of models found: one sentence each, with a code and the numbers behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing worth telling about a set of models. ``code`` names the kind, ``models`` are labels."""

    severity: Severity
    code: str
    models: tuple[str, ...]
    message: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "models": list(self.models)}

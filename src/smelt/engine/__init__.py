"""Recipe -> plan -> run -> publish."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .memory import merge_tensors
    from .planning import Plan, plan
    from .run import Artifact, merge
    from .verification import verify

__all__ = ["Artifact", "Plan", "merge", "merge_tensors", "plan", "verify"]

_HOMES = {
    "Artifact": "run", "Plan": "planning", "merge": "run", "merge_tensors": "memory", "plan": "planning",
    "verify": "verification",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'smelt.engine' has no attribute {name!r}")

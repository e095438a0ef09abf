"""Recipe -> plan -> run -> publish."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .continuing import continue_merge, plan_continued
    from .layerwise import regmean_plus_plus
    from .memory import merge_tensors
    from .planning import Plan
    from .reproduction import Reproduction, reproduce
    from .residue import Leftover, leftovers, remove_leftovers
    from .restore import restore_task
    from .run import Artifact, merge
    from .selection import Soup, choose_lambdas, greedy_soup
    from .stages import plan
    from .verification import verify

__all__ = [
    "Artifact", "Leftover", "Plan", "Reproduction", "Soup", "choose_lambdas", "continue_merge", "greedy_soup",
    "leftovers", "merge", "merge_tensors", "plan", "plan_continued", "regmean_plus_plus", "remove_leftovers",
    "reproduce", "restore_task", "verify",
]  # fmt: skip

_HOMES = {
    "Artifact": "run", "Leftover": "residue", "Plan": "planning", "Reproduction": "reproduction", "Soup": "selection",
    "choose_lambdas": "selection", "continue_merge": "continuing", "greedy_soup": "selection", "leftovers": "residue",
    "merge": "run", "merge_tensors": "memory", "plan": "stages", "plan_continued": "continuing",
    "regmean_plus_plus": "layerwise",
    "remove_leftovers": "residue", "reproduce": "reproduction", "restore_task": "restore", "verify": "verification",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'smelt.engine' has no attribute {name!r}")

"""What `smelt check` says: can these models be merged, and how best? From the weights alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .diagnose import check
    from .result import Diagnosis

__all__ = ["Diagnosis", "check"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        home = "result" if name == "Diagnosis" else "diagnose"
        return getattr(importlib.import_module(f".{home}", __name__), name)
    raise AttributeError(f"module 'smelt.diagnosis' has no attribute {name!r}")

"""Statistics checkpoints: from what training has left behind to files that merges can use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .optimizer import import_optimizer

__all__ = ["import_optimizer"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(".optimizer", __name__), name)
    raise AttributeError(f"module 'smelt.statistics' has no attribute {name!r}")

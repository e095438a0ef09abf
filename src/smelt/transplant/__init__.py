"""Give a model another model's tokenizer: rows of shared tokens stay, the others are approximated."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .transplant import transplant_tokenizer

__all__ = ["transplant_tokenizer"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(".transplant", __name__), name)
    raise AttributeError(f"module 'smelt.transplant' has no attribute {name!r}")

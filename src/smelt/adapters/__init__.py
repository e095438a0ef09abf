"""Low-rank adapters: what a fine-tune learned, as a PEFT adapter."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .extract import extract_lora
    from .report import Extraction, ModuleReport

__all__ = ["Extraction", "ModuleReport", "extract_lora"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        home = "extract" if name == "extract_lora" else "report"
        return getattr(importlib.import_module(f".{home}", __name__), name)
    raise AttributeError(f"module 'smelt.adapters' has no attribute {name!r}")

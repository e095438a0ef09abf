"""Low-rank adapters: what a fine-tune learned as a PEFT adapter, and several adapters as one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .extract import extract_lora
    from .merging import merge_lora
    from .packing import extract_delta
    from .report import AdapterArtifact, ModuleReport

__all__ = ["AdapterArtifact", "ModuleReport", "extract_delta", "extract_lora", "merge_lora"]

_HOMES = {
    "AdapterArtifact": "report", "ModuleReport": "report", "extract_delta": "packing", "extract_lora": "extract",
    "merge_lora": "merging",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'smelt.adapters' has no attribute {name!r}")

"""Low-rank adapters: what a fine-tune learned as a PEFT adapter, and several adapters as one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .extract import extract_lora, plan_extract_lora
    from .merging import merge_lora, plan_merge_lora
    from .outlook import AdapterPlan
    from .packing import extract_delta, plan_extract_delta
    from .report import AdapterArtifact, ModuleReport

__all__ = [
    "AdapterArtifact", "AdapterPlan", "ModuleReport", "extract_delta", "extract_lora", "merge_lora",
    "plan_extract_delta", "plan_extract_lora", "plan_merge_lora",
]  # fmt: skip

_HOMES = {
    "AdapterArtifact": "report", "ModuleReport": "report", "extract_delta": "packing", "extract_lora": "extract",
    "merge_lora": "merging", "plan_extract_delta": "packing", "plan_extract_lora": "extract",
    "plan_merge_lora": "merging", "AdapterPlan": "outlook",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'smelt.adapters' has no attribute {name!r}")

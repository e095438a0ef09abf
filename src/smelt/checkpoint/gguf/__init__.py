"""GGUF, the format of llama.cpp: read under the names and in the layout of Hugging Face, and written from them."""

from __future__ import annotations

from .checkpoint import GgufCheckpoint
from .layout import Described, GgufLayout, is_buffer, plan_gguf
from .writer import GgufWriter, described, write_gguf

__all__ = [
    "Described", "GgufCheckpoint", "GgufLayout", "GgufWriter", "described", "is_buffer", "plan_gguf", "write_gguf",
]  # fmt: skip

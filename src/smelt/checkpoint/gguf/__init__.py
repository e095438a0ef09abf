"""GGUF, the format of llama.cpp: read under the names and in the layout of Hugging Face, and written from them."""

from __future__ import annotations

from .checkpoint import GgufCheckpoint

__all__ = ["GgufCheckpoint"]

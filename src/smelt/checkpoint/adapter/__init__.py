"""Adapters: small files that change a model. :func:`read_adapter` tells what a PEFT folder does to which tensors."""

from __future__ import annotations

from .adapted import AdaptedCheckpoint
from .config import CONFIG, read_config
from .kohya import read_flat
from .layouts import is_transposed_layer
from .packs import KIND as PACK
from .reading import Adapter, parse, read_adapter
from .updates import Hadamard, Kronecker, LowRank, Product, Rows, Saved, Scaled, Shards, Tucker, Update

__all__ = [
    "CONFIG", "PACK", "AdaptedCheckpoint", "Adapter", "Hadamard", "Kronecker", "LowRank", "Product", "Rows", "Saved",
    "Scaled", "Shards", "Tucker", "Update", "is_transposed_layer", "parse", "read_adapter", "read_config", "read_flat",
]  # fmt: skip

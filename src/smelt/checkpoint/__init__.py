"""Weights on disk, on the hub or in memory: named tensors that can be read piece by piece."""

from __future__ import annotations

from .base import Checkpoint, Factors, FileIdentity, Part, TensorInfo
from .selection import ADAPTER, AdapterGiven
from .side import SideFiles
from .source import is_adapter, load, load_adapted, load_adapter, open_adapter, side_files
from .writer import CheckpointWriter, Shard, plan_file, plan_shards

__all__ = [
    "ADAPTER", "AdapterGiven", "Checkpoint", "CheckpointWriter", "Factors", "FileIdentity", "Part",
    "Shard", "SideFiles", "TensorInfo", "is_adapter", "load", "load_adapted", "load_adapter", "open_adapter",
    "plan_file", "plan_shards", "side_files",
]  # fmt: skip

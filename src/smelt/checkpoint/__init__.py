"""Weights on disk, on the hub or in memory: named tensors that can be read piece by piece."""

from __future__ import annotations

from .base import Checkpoint, FileIdentity, TensorInfo
from .selection import ADAPTER
from .side import SideFiles
from .source import load, load_adapter, side_files
from .writer import CheckpointWriter, Shard, plan_file, plan_shards

__all__ = [
    "ADAPTER", "Checkpoint", "CheckpointWriter", "FileIdentity", "Shard", "SideFiles", "TensorInfo", "load",
    "load_adapter", "plan_file", "plan_shards", "side_files",
]  # fmt: skip

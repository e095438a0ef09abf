"""Weights on disk, on the hub or in memory: named tensors that can be read piece by piece."""

from __future__ import annotations

from .base import Checkpoint, FileIdentity, TensorInfo
from .source import load
from .writer import CheckpointWriter, Shard, plan_shards

__all__ = ["Checkpoint", "CheckpointWriter", "FileIdentity", "Shard", "TensorInfo", "load", "plan_shards"]

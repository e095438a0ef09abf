"""Deterministic, streaming safetensors output: headers first, tensors in place, in any order.

The layout is known beforehand, so nothing is held in memory and the same tensors give the same bytes.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from .. import storage
from ..kernels.dtypes import DTYPES
from .base import TensorInfo

#: The data begins at a multiple of this, so that every dtype can be memory-mapped and read by vector code.
ALIGNMENT = 64

_METADATA = {"format": "pt"}
_WRITEBACK = 32 << 20

#: Larger alignment first, as the reference implementation orders tensors.
_ORDER = {code: rank for rank, code in enumerate(DTYPES)}


@dataclass(frozen=True)
class Shard:
    """One file to be: its name, header, size, and where each tensor's bytes begin."""

    file: str
    header: bytes
    size: int
    offsets: dict[str, int]
    tensors: tuple[TensorInfo, ...]


def plan_shards(tensors: Sequence[TensorInfo], shard_size: int) -> list[Shard]:
    """Lay tensors out in files of at most ``shard_size`` bytes of data, in the order given.

    A larger tensor gets a file of its own. One file is model.safetensors, several are numbered.
    """
    groups: list[list[TensorInfo]] = [[]]
    held = 0
    for tensor in tensors:
        if groups[-1] and held + tensor.nbytes > shard_size:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += tensor.nbytes
    total = len(groups)
    return [_shard(_file_name(number, total), group) for number, group in enumerate(groups, 1)]


def _file_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def _shard(file: str, tensors: Sequence[TensorInfo]) -> Shard:
    ordered = sorted(tensors, key=lambda tensor: (-DTYPES[tensor.dtype].bits, tensor.name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(_METADATA.items()))}
    position = 0
    offsets = {}
    for tensor in ordered:
        end = position + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        offsets[tensor.name] = position
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    begin = 8 + len(text)
    absolute = {name: begin + offset for name, offset in offsets.items()}
    return Shard(file, struct.pack("<Q", len(text)) + text, begin + position, absolute, tuple(ordered))


class CheckpointWriter:
    """Writes tensors piece by piece at their final places. Thread-safe."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self._folder = folder
        self._shards = list(shards)
        self._descriptors: dict[str, int] = {}
        self._home: dict[str, tuple[Shard, TensorInfo]] = {}
        self._unsynced: dict[str, int] = {}
        self._lock = threading.Lock()
        try:
            for shard in shards:
                self._create(shard)
        except BaseException:
            self.abort()
            raise

    def _create(self, shard: Shard) -> None:
        path = self._folder / shard.file
        self._descriptors[shard.file] = storage.create(path, shard.size)
        storage.pwrite_all(self._descriptors[shard.file], memoryview(shard.header), 0, path)
        self._home.update({tensor.name: (shard, tensor) for tensor in shard.tensors})

    def write(self, name: str, start: int, array: npt.NDArray[Any]) -> None:
        """Write elements from ``start`` on; ``array`` is contiguous, in the dtype's storage type."""
        shard, tensor = self._home[name]
        offset = shard.offsets[name] + start * DTYPES[tensor.dtype].bits // 8
        descriptor = self._descriptors[shard.file]
        storage.pwrite_all(descriptor, memoryview(array).cast("B"), offset, self._folder / shard.file)
        if self._due(shard.file, array.nbytes):
            storage.start_writeback(descriptor, 0, 0)

    def _due(self, file: str, nbytes: int) -> bool:
        """Whether enough has been written to make the disk begin, so that the last sync finds little to do."""
        with self._lock:
            waiting = self._unsynced.get(file, 0) + nbytes
            due = waiting >= _WRITEBACK
            self._unsynced[file] = 0 if due else waiting
            return due

    def finish(self) -> None:
        """Write the index of several files; wait until everything is on the disk; close."""
        if len(self._shards) > 1:
            storage.write_small(self._folder / "model.safetensors.index.json", self._index())
        for file, descriptor in self._descriptors.items():
            storage.fsync(descriptor, self._folder / file)
        self.abort()

    def _index(self) -> bytes:
        tensors = [tensor for shard in self._shards for tensor in shard.tensors]
        metadata = {
            "total_parameters": sum(tensor.count for tensor in tensors),
            "total_size": sum(tensor.nbytes for tensor in tensors),
        }
        weight_map = {name: self._home[name][0].file for name in sorted(self._home)}
        return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, ensure_ascii=False) + "\n").encode()

    def abort(self) -> None:
        """Close all files, whatever state they are in."""
        for descriptor in self._descriptors.values():
            storage.close(descriptor)
        self._descriptors = {}

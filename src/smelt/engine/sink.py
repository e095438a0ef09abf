"""The output on disk: tiles written in place as they come, hashed in order.

Tiles of a tensor finish in any order, SHA-256 wants them in sequence: a tile that comes early waits in
memory until its turn. Tiles are started in order, so few ever wait.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..checkpoint import CheckpointWriter, Shard, TensorInfo
from ..checkpoint.gguf import GgufWriter

_Waiting = dict[int, tuple[npt.NDArray[Any], Callable[[], None]]]


class OrderedDigest:
    """SHA-256 of a tensor whose tiles arrive in any order. One thread hashes at a time, none waits."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._next = 0
        self._waiting: _Waiting = {}
        self._busy = False
        self._lock = threading.Lock()

    def add(self, start: int, array: npt.NDArray[Any], release: Callable[[], None]) -> None:
        with self._lock:
            self._waiting[start] = (array, release)
            if self._busy:
                return
            self._busy = True
        self._drain()

    def _drain(self) -> None:
        while True:
            with self._lock:
                item = self._waiting.pop(self._next, None)
                if item is None:
                    self._busy = False
                    return
            array, release = item
            self._hash.update(array.data)
            self._next += len(array)
            release()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


Writer = CheckpointWriter | GgufWriter


class DiskSink:
    """Writes tiles through a writer and keeps the SHA-256 of every tensor, as it will be read."""

    def __init__(self, writer: Writer, names: list[str]) -> None:
        self._writer = writer
        self._digests = {name: OrderedDigest() for name in names}

    def write(self, name: str, start: int, array: npt.NDArray[Any], release: Callable[[], None]) -> None:
        self._digests[name].add(start, self._writer.write(name, start, array), release)

    def finish(self, name: str) -> None:
        pass

    def sha256(self) -> dict[str, str]:
        """Tensor name -> SHA-256 of its bytes, once all are written."""
        return {name: digest.hexdigest() for name, digest in sorted(self._digests.items())}


def write_tensors(folder: Path, shards: Sequence[Shard], fill: Callable[[DiskSink], None]) -> dict[str, dict[str, Any]]:
    """Write weight files of ``folder``, laid out as ``shards``; ``fill`` brings the elements of their tensors.

    Returns name -> dtype, shape, file, sha256.
    """
    tensors = [info for shard in shards for info in shard.tensors]
    return write_through(CheckpointWriter(folder, shards), tensors, fill)


def write_through(
    writer: Writer, tensors: Sequence[TensorInfo], fill: Callable[[DiskSink], None]
) -> dict[str, dict[str, Any]]:
    """The same with a writer that has been opened; it is closed in any case."""
    try:
        sink = DiskSink(writer, [info.name for info in tensors])
        fill(sink)
        writer.finish()
    finally:
        writer.abort()
    sums = sink.sha256()
    return {
        info.name: {"dtype": info.dtype, "shape": list(info.shape), "file": info.file, "sha256": sums[info.name]}
        for info in tensors
    }

"""The output on disk: tiles written in place as they come, hashed in order.

Tiles of a tensor finish in any order, SHA-256 wants them in sequence: a tile that comes early waits in
memory until its turn. One thread hashes a tensor, so many wait where the others are faster: whoever makes
tiles looks at how much waits.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import storage
from ..checkpoint import CheckpointWriter, Shard, TensorInfo
from ..kernels.dtypes import DTYPES
from .execute import usable_cores
from .journal import Journal
from .tiles import TILE

_Waiting = dict[int, tuple[npt.NDArray[Any], Callable[[], None]]]


class _Backlog:
    """Bytes of tiles that wait to be hashed."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.nbytes += nbytes


class OrderedDigest:
    """SHA-256 of a tensor whose tiles arrive in any order. One thread hashes at a time, none waits."""

    def __init__(self, backlog: _Backlog) -> None:
        self._backlog = backlog
        self._hash = hashlib.sha256()
        self._next = 0
        self._waiting: _Waiting = {}
        self._busy = False
        self._lock = threading.Lock()

    def add(self, start: int, array: npt.NDArray[Any], release: Callable[[], None]) -> None:
        self._backlog.add(array.nbytes)
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
            self._backlog.add(-array.nbytes)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


if TYPE_CHECKING:
    from ..checkpoint.gguf import GgufLayout, GgufWriter

    Writer = CheckpointWriter | GgufWriter


class DiskSink:
    """Writes tiles through a writer and keeps the SHA-256 of every tensor, as it will be read.

    ``done``: of tensors that are there from an earlier run; they are not to be written.
    """

    def __init__(
        self, writer: Writer, tensors: Sequence[TensorInfo], journal: Journal | None = None,
        done: Mapping[str, str] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.done = done
        self._writer, self._journal = writer, journal
        self._sizes = {info.name: info.nbytes for info in tensors}
        self._backlog = _Backlog()
        self._digests = {name: OrderedDigest(self._backlog) for name in self._sizes if name not in done}

    @property
    def waiting(self) -> int:
        return self._backlog.nbytes

    def write(self, name: str, start: int, array: npt.NDArray[Any], release: Callable[[], None]) -> None:
        read = self._writer.write(name, start, array)
        if not np.may_share_memory(read, array):
            release()
            release = _nothing
        self._digests[name].add(start, read, release)

    def read(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` with elements that have been written, as they are stored."""
        self._writer.read(name, start, out)

    def finish(self, name: str) -> None:
        """Called by one thread alone."""
        if self._journal is not None:
            self._journal.add(name, self._digests[name].hexdigest(), self._sizes[name])
            if self._journal.is_due:
                self._journal.commit(self._writer.sync)

    def sha256(self) -> dict[str, str]:
        """Tensor name -> SHA-256 of its bytes, once all are written."""
        return {**self.done, **{name: digest.hexdigest() for name, digest in self._digests.items()}}


def _nothing() -> None:
    """What was lent is back already."""


def write_tensors(
    folder: Path, shards: Sequence[Shard], fill: Callable[[DiskSink], None], journal: Journal | None = None
) -> dict[str, dict[str, Any]]:
    """Write weight files of ``folder``, laid out as ``shards``; ``fill`` brings the elements of their tensors.

    With a ``journal`` what an earlier run has finished is kept, if it reads as it was written.
    Returns name -> dtype, shape, file, sha256.
    """
    tensors = [info for shard in shards for info in shard.tensors]
    if journal is not None:
        _remove_others(folder, {shard.file for shard in shards})
    return _write_through(CheckpointWriter(folder, shards, again=journal is not None), tensors, fill, journal)


def write_gguf_tensors(
    folder: Path, layout: GgufLayout, fill: Callable[[DiskSink], None], journal: Journal
) -> dict[str, dict[str, Any]]:
    """The same for one GGUF file."""
    from ..checkpoint.gguf import GgufWriter

    _remove_others(folder, {layout.file})
    return _write_through(GgufWriter(folder, layout, again=True), layout.tensors, fill, journal)


def _write_through(
    writer: Writer, tensors: Sequence[TensorInfo], fill: Callable[[DiskSink], None], journal: Journal | None
) -> dict[str, dict[str, Any]]:
    """With a writer that has been opened; it is closed in any case."""
    try:
        done: dict[str, str] = {}
        if journal is not None:
            done = _intact(writer, tensors, journal.finished)
            for name in done:
                writer.skip(name)
        sink = DiskSink(writer, tensors, journal, done)
        fill(sink)
        if journal is not None:
            journal.commit(writer.sync)
        writer.finish()
    finally:
        writer.abort()
    sums = sink.sha256()
    return {
        info.name: {"dtype": info.dtype, "shape": list(info.shape), "file": info.file, "sha256": sums[info.name]}
        for info in tensors
    }


def _remove_others(folder: Path, wanted: set[str]) -> None:
    """What an earlier run wrote beside the weights: it is written again."""
    for name in set(storage.files_below(folder)) - wanted:
        storage.remove_file(folder / name)


def _intact(writer: Writer, tensors: Sequence[TensorInfo], finished: Mapping[str, str]) -> dict[str, str]:
    """Those of the finished tensors whose bytes are still what the journal says."""
    candidates = [info for info in tensors if info.name in finished]
    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="smelt") as pool:
        found = pool.map(lambda info: sha256_of(writer.read, info), candidates)
        return {
            info.name: digest for info, digest in zip(candidates, found, strict=True) if digest == finished[info.name]
        }


def sha256_of(
    read: Callable[[str, int, npt.NDArray[Any]], None], info: TensorInfo, seen: Callable[[int], None] | None = None
) -> str:
    """SHA-256 of a tensor's stored bytes, read tile by tile. ``seen`` is told how many bytes were read."""
    digest = hashlib.sha256()
    dtype = DTYPES[info.dtype]
    count = info.nbytes // np.dtype(dtype.storage).itemsize
    buffer = np.empty(min(TILE, count), dtype.storage)
    for start in range(0, count, TILE):
        part = buffer[: min(TILE, count - start)]
        read(info.name, start, part)
        digest.update(part.data)
        if seen is not None:
            seen(part.nbytes)
    return digest.hexdigest()

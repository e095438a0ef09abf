"""Blocks of remote files on the local disk, so that none is fetched twice: not by a second pass, nor by a second run.

The folder is bounded in size, the oldest blocks go first, and it may be deleted at any time. A block is one
file: its bytes and their XXH3-128, compared once in each run.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
import weakref
from functools import cache
from pathlib import Path
from typing import Any

from ... import storage
from ...errors import OperationFailed, UsageError, show
from ...storage import FileIdentity

_GB = 10**9
_DEFAULT = 20 * _GB
_DIGEST = 16
_PIECE = 1 << 20
_ABANDONED = 3600 * 10**9  # nanoseconds

#: The folder holds this much whatever is asked for: what is in flight must not push itself out.
_LEAST = 256 << 20


class Store:
    """A folder of blocks by name, ``limit`` bytes in all as far as this process knows. Thread-safe."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._lock = threading.Lock()
        self._sizes = {file.path.name: file.size for file in _found(folder)}
        self._total = sum(self._sizes.values())
        self._checked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def read(self, name: str, start: int, out: memoryview) -> bool:
        """Fill ``out`` with bytes of a block; False when it is not there, or damaged."""
        if name not in self._sizes:
            return False
        try:
            descriptor = storage.open_read(self._folder / name)
        except OperationFailed:  # another process removed it
            self._drop(name)
            return False
        try:
            return self._read(descriptor, name, start, out)
        finally:
            storage.close(descriptor)

    def _read(self, descriptor: int, name: str, start: int, out: memoryview) -> bool:
        try:
            if name not in self._checked and not _is_whole(descriptor):
                raise OperationFailed(f"{show(name)} is damaged")
            storage.pread_into(descriptor, out, start, name)
        except OperationFailed:
            self._drop(name)
            return False
        self._checked.add(name)
        return True

    def write(self, name: str, data: memoryview) -> None:
        """Keep a block, and forget the oldest ones that are too many."""
        digest = _hash()
        digest.update(data)
        storage.write_atomically(self._folder / name, b"".join((data, digest.digest())))
        with self._lock:
            self._total += len(data) + _DIGEST - self._sizes.pop(name, 0)
            self._sizes[name] = len(data) + _DIGEST
            surplus = self._surplus()
        for old in surplus:
            self._checked.discard(old)
            storage.forget(self._folder / old)

    def _surplus(self) -> list[str]:
        names = []
        for name in list(self._sizes)[:-1]:
            if self._total <= self._limit:
                break
            self._total -= self._sizes.pop(name)
            names.append(name)
        return names

    def _drop(self, name: str) -> None:
        with self._lock:
            self._total -= self._sizes.pop(name, 0)
        self._checked.discard(name)
        storage.forget(self._folder / name)


def _found(folder: Path) -> list[FileIdentity]:
    """The blocks that are there, the oldest first. What a run that was killed left half written goes."""
    found = []
    for name in storage.listdir(folder):
        with contextlib.suppress(OperationFailed):  # another process may just have removed it
            found.append(storage.identity(folder / name))
    for file in found:
        if file.path.name.startswith(".") and file.mtime_ns < time.time_ns() - _ABANDONED:
            storage.forget(file.path)
    return sorted((file for file in found if not file.path.name.startswith(".")), key=lambda file: file.mtime_ns)


def _hash() -> Any:
    import xxhash

    return xxhash.xxh3_128()


def _is_whole(descriptor: int) -> bool:
    size = storage.identity(Path("block"), descriptor).size - _DIGEST
    if size < 0:
        return False
    digest, piece, last = _hash(), bytearray(min(size, _PIECE)), bytearray(_DIGEST)
    for offset in range(0, size, _PIECE):
        part = memoryview(piece)[: size - offset]
        storage.pread_into(descriptor, part, offset)
        digest.update(part)
    storage.pread_into(descriptor, memoryview(last), size)
    return bool(digest.digest() == last)


def the_store() -> Store:
    """The one of this process."""
    return _open(os.environ.get("SMELT_CACHE"), _limit(os.environ.get("SMELT_CACHE_GB")))


@cache
def _open(home: str | None, limit: int) -> Store:
    """In $SMELT_CACHE; in a temporary folder where that cannot be written."""
    folder = storage.cache_folder("blocks")
    if folder is not None:
        return Store(folder, _within(folder, limit))
    folder = Path(tempfile.mkdtemp(prefix="smelt-blocks-"))
    store = Store(folder, _within(folder, limit))
    weakref.finalize(store, storage.remove_tree, folder)
    return store


def _within(folder: Path, limit: int) -> int:
    """No more than half of the free space beside what is there already."""
    there = sum(file.size for file in _found(folder))
    return max(_LEAST, min(limit, there + storage.free_bytes(folder) // 2))


def _limit(text: str | None) -> int:
    try:
        gigabytes = float(text) if text else _DEFAULT / _GB
    except ValueError:
        gigabytes = -1
    if not 0 <= gigabytes < 1e6:
        raise UsageError(f"SMELT_CACHE_GB is {show(text)}, expected a number of gigabytes, such as 20")
    return int(gigabytes * _GB)

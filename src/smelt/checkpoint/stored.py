"""The seam below the parsers: something of known size and identity that can be read at an offset."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from .. import storage
from ..errors import OperationFailed
from ..storage import FileIdentity


class Stored(ABC):
    """One file, here or elsewhere. Reads are thread-safe.

    ``name`` is how messages name it, unquoted; ``identity`` what it was when it was opened.
    """

    name: str
    identity: FileIdentity

    @abstractmethod
    def read_into(self, out: memoryview, offset: int) -> None:
        """Fill ``out`` from ``offset`` on. Raises OperationFailed when that fails or the file ends early."""

    def read_alone(self, out: memoryview, offset: int) -> None:
        """As :meth:`read_into`, where nothing around it will be wanted: a header."""
        self.read_into(out, offset)

    def read_runs(self, out: memoryview, offsets: Sequence[int]) -> None:
        """Fill ``out`` with equally long runs of bytes, one from each offset."""
        view = storage.flat(out)
        length = len(view) // max(1, len(offsets))
        for place, offset in enumerate(offsets):
            self.read_into(view[place * length : (place + 1) * length], offset)

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raise OperationFailed when the name no longer leads to the file as it was opened."""

    @property
    def notices(self) -> Sequence[str]:
        """What is worth a warning about where it lies."""
        return ()

    @abstractmethod
    def close(self) -> None:
        """Release what it holds, once; further reads fail."""


class LocalFile(Stored):
    """A regular file of this machine, open for reading by position."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._descriptor = storage.open_read(path)
        self._closing = weakref.finalize(self, storage.close, self._descriptor)
        try:
            self.identity = storage.identity(path, self._descriptor)
        except BaseException:
            self.close()
            raise

    def read_into(self, out: memoryview, offset: int) -> None:
        storage.pread_into(self._descriptor, out, offset, self.name)

    def read_runs(self, out: memoryview, offsets: Sequence[int]) -> None:
        storage.pread_runs(self._descriptor, out, offsets, self.name)

    def check_unchanged(self) -> None:
        now = storage.identity(self.identity.path)
        if now != self.identity:
            raise changed(self.name, _difference(self.identity, now))

    def close(self) -> None:
        self._closing()
        self._descriptor = -1  # its number may soon be another file's


def changed(name: str, what: str) -> OperationFailed:
    return OperationFailed(f"{storage.shown(name)} changed while it was being read ({what}): run again")


def _difference(before: FileIdentity, now: FileIdentity) -> str:
    if (before.device, before.inode) != (now.device, now.inode):
        return "it was replaced"
    if before.size != now.size:
        return f"from {before.size} to {now.size} bytes"
    return "it was written to"

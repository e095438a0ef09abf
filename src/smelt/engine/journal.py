"""What a run has finished, so that the next one can go on after a crash.

A line is written only when the data that it speaks of has been synced, and is synced itself before the next
one. So the journal can lack what is there, but not claim what is not; what it claims is read again all the
same before it is relied on.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import storage
from ..errors import InputRejected
from .operands import CheckpointOperand, Ledger
from .outputs import Output
from .statistics import FactoredOperand

NAME = "journal"

#: The disk is waited for after so many bytes of finished tensors, and with the first that is finished after so many
#: seconds: slow methods make few bytes, and each is dear.
INTERVAL, PATIENCE = 256 << 20, 2.0

#: A disk on which that takes long is asked less often: this part of the time at most, but for what many bytes take.
_SHARE = 0.05

_LARGEST = 1 << 30

#: (name of input model, tensor, digest of what was read)
Reads = list[tuple[str, str, str]]


class Journal:
    """The journal of one attempt.

    ``finished``: name -> SHA-256 of the output tensors that an earlier run has recorded, ``reads`` what it read for
    each. ``reads_of`` tells that of a tensor of this run; None where it is not known yet, and the tensor then is
    left to the next run.
    """

    def __init__(self, path: Path, reads_of: Callable[[str], Reads | None]) -> None:
        self._path, self._reads_of = path, reads_of
        self._waiting: list[bytes] = []
        self._bytes = 0
        self._next = time.monotonic() + PATIENCE
        self.paused = False
        entries, length = recorded(path)
        self.finished = {entry["tensor"]: entry["sha256"] for entry in entries}
        self.reads: dict[str, Reads] = {entry["tensor"]: entry["reads"] for entry in entries}
        self._descriptor = storage.reopen(path, length)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        storage.close(self._descriptor)

    def add(self, name: str, sha256: str, nbytes: int) -> None:
        """A tensor is finished."""
        reads = None if self.paused else self._reads_of(name)
        if reads is not None:
            self._waiting.append(_line({"tensor": name, "sha256": sha256, "reads": reads}))
            self._bytes += nbytes

    @property
    def is_due(self) -> bool:
        return self._bytes >= INTERVAL or (bool(self._waiting) and time.monotonic() >= self._next)

    def commit(self, sync: Callable[[], None]) -> None:
        """Sync the data, then record what it is."""
        began = time.monotonic()
        sync()
        storage.append(self._descriptor, b"".join(self._waiting), self._path)
        self._waiting, self._bytes = [], 0
        ended = time.monotonic()
        self._next = ended + max(PATIENCE, (ended - began) / _SHARE)


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def recorded(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The entries up to the first that is torn, and where they end."""
    try:
        data = storage.read_small(path, _LARGEST) if storage.exists(path) else b""
    except InputRejected:
        data = b""
    found = list(_entries(data))
    return found, sum(len(_line(entry)) for entry in found)


def _entries(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.splitlines(keepends=True):
        text = line[9:-1]
        if line != b"%08x %s\n" % (zlib.crc32(text), text):
            return
        yield json.loads(text)


# --- what was read --------------------------------------------------------------------------------------


def reads_of(ledger: Ledger, output: Output) -> Reads | None:
    """The digests of what was read for a finished tensor; None where some of it was not read whole."""
    found: Reads = []
    for operand in _operands(ledger, output):
        if ledger.untouched(operand.label, operand.name):
            continue
        digest = ledger.digest(operand.label, operand.name, operand.count)
        if digest is None:
            return None
        found.append((operand.label, operand.name, digest))
    return found


def _operands(ledger: Ledger, output: Output) -> Iterator[CheckpointOperand]:
    """All tensors of checkpoints that go into an output, but those that lend it rows: they are read at the end."""
    for operand in (*(source.operand(ledger) for source in output.piece.sources), *output.statistics):
        if isinstance(operand, FactoredOperand):
            yield from operand.parts
        elif isinstance(operand, CheckpointOperand):
            yield operand

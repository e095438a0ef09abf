"""A remote file read by position: in blocks, each fetched once, and the next ones while one is used.

Memory is bounded by what is in flight: ``CONNECTIONS`` blocks in the whole process. What has been fetched is
on the local disk, see :mod:`.store`.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

from ... import storage
from ...errors import InputRejected, OperationFailed, show
from ..stored import Stored, changed
from .store import Store, the_store
from .transport import Beginning, Interrupted, NotThere, Transport, patiently

#: Bytes of a block: large enough that a round trip costs little beside it.
BLOCK = 8 << 20

#: Blocks fetched at a time, and blocks of one file fetched before they are asked for.
CONNECTIONS = 8
AHEAD = 3

#: Bytes read at first, which hold the header of most files.
HEAD = 128 << 10

#: Memory in flight: each block, its copy on the way to the disk, and one more where a library returns bytes.
SCRATCH = 3 * CONNECTIONS * BLOCK


@cache
def pool() -> ThreadPoolExecutor:
    """The threads that fetch, for all files of the process."""
    return ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="smelt-fetch")


class RemoteFile(Stored):
    """A file at the other end of ``transport``; ``file`` is its plain name."""

    def __init__(self, transport: Transport, file: str, store: Store | None = None) -> None:
        self.name = transport.name
        self._transport = transport
        self._store = store or the_store()
        start = _begun(transport, HEAD)
        self._head = memoryview(start.head)
        self.identity = storage.FileIdentity(Path(file), 0, 0, start.size, 0, f"{self.name} {start.version}")
        self._versioned = bool(start.version)
        self._key = _key(transport, start)
        self._lock = threading.Lock()
        self._pending: dict[int, Future[memoryview]] = {}
        self._seen = {-1}
        self._closed = False

    def read_alone(self, out: memoryview, offset: int) -> None:
        if offset + len(out) <= len(self._head):
            out[:] = self._head[offset : offset + len(out)]
        else:
            self._fill(out, offset)

    def read_into(self, out: memoryview, offset: int) -> None:
        out = storage.flat(out)
        if offset + len(out) > self.identity.size:
            raise OperationFailed(f"{storage.shown(self.name)} ends early: {self.identity.size} bytes are there")
        for index, begin, part in _parts(out, offset):
            self._read(index, begin, part)

    def _read(self, index: int, begin: int, part: memoryview) -> None:
        start = index * BLOCK + begin
        if start + len(part) <= len(self._head):
            part[:] = self._head[start : start + len(part)]
            return
        self._look_ahead(index)
        while not self._store.read(self._block_name(index), begin, part):
            if (fetching := self._wanted(index)) is not None:
                part[:] = fetching.result()[begin : begin + len(part)]
                return

    def _look_ahead(self, index: int) -> None:
        """Start fetching what comes next, where blocks are asked for in order."""
        if index - 1 in self._seen:
            for following in range(index + 1, min(index + 1 + AHEAD, self._count)):
                self._wanted(following)
        self._seen.add(index)

    @property
    def _count(self) -> int:
        return -(-self.identity.size // BLOCK)

    def _block_name(self, index: int) -> str:
        return f"{self._key}-{index}"

    def _wanted(self, index: int) -> Future[memoryview] | None:
        """The fetching of a block: the one that is under way, or a new one; None when it has ended."""
        with self._lock:
            if self._closed:
                raise OperationFailed(f"{storage.shown(self.name)} is closed")
            if index not in self._pending and self._block_name(index) not in self._store:
                self._pending[index] = pool().submit(self._fetched, index)
            return self._pending.get(index)

    def _fetched(self, index: int) -> memoryview:
        """Runs on a thread of the pool."""
        try:
            start = index * BLOCK
            block = memoryview(bytearray(min(BLOCK, self.identity.size - start)))
            known = self._head[start:BLOCK] if index == 0 else self._head[:0]
            block[: len(known)] = known
            self._fill(block[len(known) :], start + len(known))
            self._store.write(self._block_name(index), block)
            return block
        finally:
            with self._lock:
                self._pending.pop(index, None)

    def _fill(self, out: memoryview, offset: int) -> None:
        """Fill all of ``out``; where it broke off, the next request goes on."""
        done = 0
        while done < len(out):
            try:
                done += patiently(partial(self._some, out[done:], offset + done), self.name)
            except NotThere as error:
                raise changed(self.name, f"it is gone: {error}") from error

    def _some(self, out: memoryview, offset: int) -> int:
        if self._closed:
            raise OperationFailed(f"{storage.shown(self.name)} is closed")
        got = self._transport.fill(out, offset)
        if not got:
            raise Interrupted(f"nothing came for byte {offset}")
        return got

    def check_unchanged(self) -> None:
        try:
            now = _begun(self._transport, 1)
        except InputRejected as error:
            raise changed(self.name, "it is gone") from error
        if now.size != self.identity.size:
            raise changed(self.name, f"from {self.identity.size} to {now.size} bytes")
        if f"{self.name} {now.version}" != self.identity.version:
            raise changed(self.name, "it was replaced")

    @property
    def notices(self) -> Sequence[str]:
        told = "the server does not tell one version from another: a change would go unseen, and nothing is kept"
        return () if self._versioned else (f"{show(self.identity.path.name)}: {told}",)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            waiting = list(self._pending.values())
        for future in waiting:
            future.cancel()


def _parts(out: memoryview, offset: int) -> Iterator[tuple[int, int, memoryview]]:
    """Which block, from which byte of it on, and the part of ``out`` that it fills."""
    done = 0
    while done < len(out):
        index, begin = divmod(offset + done, BLOCK)
        part = out[done : done + BLOCK - begin]
        yield index, begin, part
        done += len(part)


def _begun(transport: Transport, count: int) -> Beginning:
    try:
        return patiently(lambda: transport.begin(count), transport.name)
    except NotThere as error:
        raise InputRejected(f"{storage.shown(transport.name)}: {error}") from error


def _key(transport: Transport, start: Beginning) -> str:
    """What names the blocks: of a file whose versions cannot be told apart they serve this run alone."""
    version = start.version or secrets.token_hex(16)
    return hashlib.sha256(repr((transport.key, version, start.size, BLOCK)).encode()).hexdigest()[:32]

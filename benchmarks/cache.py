"""Bring the page cache into a known state before something is timed."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

BUFFER = 8 << 20
MOST_SCRATCH = 4 << 30
GIVE_BACK_SECONDS = 3.0


def warm(paths: Iterable[Path]) -> None:
    """Read every file, so that what fits is in the page cache."""
    buffer = bytearray(BUFFER)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(paths: Iterable[Path]) -> None:
    """Drop every file from the page cache; needs no privilege, but the pages must be clean and unmapped."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(paths: Iterable[Path]) -> float:
    """The fraction of the pages of these files that is in the page cache, asked of ``mincore``."""
    counts = [pages(path) for path in paths]
    total = sum(every for _, every in counts)
    return sum(held for held, _ in counts) / total if total else 0.0


def pages(path: Path) -> tuple[int, int]:
    """How many pages of a non-empty file are in memory, and how many it has."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        size = len(view)
        flags = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        anchor = ctypes.c_byte.from_buffer(view)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), flags)
        # The map cannot be closed while ctypes still points into it.
        del anchor
        if failed:
            raise OSError(ctypes.get_errno(), "mincore", str(path))
    return sum(flag & 1 for flag in flags), len(flags)


@contextmanager
def memory_at_hand(folder: Path, nbytes: int) -> Iterator[None]:
    """Let every timed program find free memory in the same state: freed when this context ends.

    A virtual machine gives free memory back to its host after about two seconds, and the first write to a
    page that the host must find again costs ten times a write to any other. So what was freed before is
    left to go, then memory for an output is claimed as a file that never reaches the disk, and freed at
    the last moment. On a real machine this changes nothing.
    """
    time.sleep(GIVE_BACK_SECONDS)
    path = folder / "scratch"
    block = bytes(BUFFER)
    with path.open("wb", buffering=0) as file:
        for _ in range(0, min(nbytes, MOST_SCRATCH), BUFFER):
            file.write(block)
    yield
    path.unlink()

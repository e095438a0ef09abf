"""Bring the page cache into a known state before something is timed."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

BUFFER = 8 << 20
MOST_SCRATCH = 4 << 30


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
    held = total = 0
    for path in paths:
        pages = residency(path)
        held += sum(pages)
        total += len(pages)
    return held / total if total else 0.0


def residency(path: Path) -> bytes:
    """One byte per page of a non-empty file: 1 if it is in memory."""
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
    return bytes(flag & 1 for flag in flags)


def take_back_memory(folder: Path, nbytes: int) -> None:
    """Let every timed program find free memory in the same state: written to a moment ago.

    A virtual machine gives free memory back to its host after a second or two, and the first write to
    a page that the host has to find again costs ten times a write to one it has not. Writing a file as
    large as the output and removing it before it reaches the disk evens that out.
    """
    path = folder / "scratch"
    block = bytes(BUFFER)
    with path.open("wb", buffering=0) as file:
        for _ in range(0, min(nbytes, MOST_SCRATCH), BUFFER):
            file.write(block)
        path.unlink()

"""The one seam through which smelt touches the file system.

Everything that opens, reads, writes, syncs, renames or removes goes through these functions, so that tests
can make any of them fail, and a reader can see in one place what is promised to the disk. Every OSError
becomes an :class:`OperationFailed` that names the path.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputRejected, OperationFailed, show

#: Linux moves at most this many bytes per read or write call.
_MOST = 0x7FFFF000


@contextlib.contextmanager
def _told(action: str, path: object) -> Iterator[None]:
    """Turn an OSError into a sentence: what failed, on which path, and why."""
    try:
        yield
    except OSError as error:
        raise OperationFailed(f"cannot {action} {show(path)}: {error.strerror or error}") from error


def open_read(path: Path) -> int:
    """A read-only descriptor of a regular file. A FIFO, device, socket or folder is refused, never waited on."""
    with _told("open", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputRejected(f"{show(path)} is not a regular file")
    return descriptor


def close(descriptor: int) -> None:
    os.close(descriptor)


def pread_into(descriptor: int, out: memoryview, offset: int, path: object = "file") -> None:
    """Fill ``out`` from ``offset`` on, whatever the size of single reads. OperationFailed at an early end."""
    view, done = out.cast("B"), 0
    with _told("read", path):
        while done < len(view):
            got = os.preadv(descriptor, [view[done : done + _MOST]], offset + done)
            if got == 0:
                raise OperationFailed(f"{show(path)} ends early: no byte at offset {offset + done}")
            done += got


def pwrite_all(descriptor: int, data: memoryview, offset: int, path: object = "file") -> None:
    """Write all of ``data`` at ``offset``."""
    view, done = data.cast("B"), 0
    with _told("write", path):
        while done < len(view):
            done += os.pwrite(descriptor, view[done : done + _MOST], offset + done)


def create(path: Path, size: int = 0) -> int:
    """A new file, preallocated to ``size`` bytes, so that a full disk fails before any work."""
    with _told("create", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _allocate(descriptor, size, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _allocate(descriptor: int, size: int, path: Path) -> None:
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        elif size:
            os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = free_bytes(path.parent)
            raise OperationFailed(f"no space for {show(path)}: {size} bytes needed, {free} free") from error
        raise OperationFailed(f"cannot allocate {show(path)}: {error.strerror}") from error


def fsync(descriptor: int, path: object = "file") -> None:
    """Wait until the file is on the disk. A failure is final: its pages may be lost."""
    with _told("sync", path):
        os.fsync(descriptor)


def fsync_directory(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    with _told("sync", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def start_writeback(descriptor: int, offset: int, length: int) -> None:
    """Ask the kernel to begin writing a range out, so that the final fsync finds little to do."""
    call = _libc_function("sync_file_range")
    if call is not None:
        call(descriptor, ctypes.c_int64(offset), ctypes.c_int64(length), 2)


def advise_willneed(descriptor: int, offset: int, length: int) -> None:
    """Tell the kernel that a range will be read soon."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)


def mkdir(path: Path) -> None:
    """Make one new folder. OperationFailed when it exists."""
    with _told("make the folder", path):
        os.mkdir(path, 0o777)


def make_folders(path: Path) -> None:
    """Make a private folder and its parents, where missing."""
    with _told("make the folder", path):
        os.makedirs(path, mode=0o700, exist_ok=True)


def publish_directory(staging: Path, destination: Path) -> None:
    """Give a finished folder its name, at once, never over another; then sync the parent.

    Linux: renameat2 with RENAME_NOREPLACE. Elsewhere a check and a rename, with a window between them in
    which another process could create the destination; an empty one is then replaced, a full one refused.
    """
    fsync_directory(staging)
    with contextlib.suppress(FileNotFoundError, OSError):
        os.rmdir(destination)
    with _told("publish", destination):
        if not _rename_noreplace(staging, destination):
            if os.path.lexists(destination):
                raise FileExistsError(errno.EEXIST, "it exists and is not empty")
            os.rename(staging, destination)
    fsync_directory(destination.parent)


def _rename_noreplace(source: Path, destination: Path) -> bool:
    """renameat2(RENAME_NOREPLACE); False where the system or file system does not have it."""
    call = _libc_function("renameat2")
    if call is None:
        return False
    here = -100  # AT_FDCWD
    if call(here, os.fsencode(source), here, os.fsencode(destination), 1) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code))


def _libc_function(name: str) -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def read_small(path: Path, limit: int) -> bytes:
    """All bytes of a regular file. InputRejected above ``limit`` bytes."""
    descriptor = open_read(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise InputRejected(f"{show(path)} has {size} bytes, at most {limit} are accepted")
        data = bytearray(size)
        pread_into(descriptor, memoryview(data), 0, path)
        return bytes(data)
    finally:
        os.close(descriptor)


def write_small(path: Path, data: bytes) -> None:
    """Create, write and sync one small file."""
    descriptor = create(path)
    try:
        pwrite_all(descriptor, memoryview(data), 0, path)
        fsync(descriptor, path)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` by rename unless it is there already; for caches, so nothing is synced."""
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with _told("write", path):
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)


def listdir(path: Path) -> list[str]:
    """The names in a folder, sorted."""
    with _told("list", path):
        return sorted(os.listdir(path))


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it; absent is fine."""
    with _told("remove", path), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def free_bytes(path: Path) -> int:
    """Space that an unprivileged process may still use on the file system of ``path``."""
    with _told("look at", path):
        facts = os.statvfs(path)
    return facts.f_bavail * facts.f_frsize

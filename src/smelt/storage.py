"""The one seam through which smelt touches the file system.

Everything that opens, reads, writes, syncs, renames or removes goes through these functions, so that tests
can make any of them fail, and a reader can see in one place what is promised to the disk. Every OSError
becomes an :class:`OperationFailed` that names the path.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import InputRejected, OperationFailed, show

#: Linux moves at most this many bytes per read or write call.
_MOST = 0x7FFFF000


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What a file was when it was opened; compared again after the last read.

    Of a remote file ``path`` is the bare name, and ``version`` tells its states apart.
    """

    path: Path
    device: int
    inode: int
    size: int
    mtime_ns: int
    version: str = ""


def shown(path: object) -> str:
    """A path as messages name it: quoted, on one line, bounded, and long enough to keep the file's name."""
    return show(path, 1000)


@contextlib.contextmanager
def _told(action: str, path: object) -> Iterator[None]:
    """Turn an OSError into a sentence: what failed, on which path, and why."""
    try:
        yield
    except OSError as error:
        raise OperationFailed(f"cannot {action} {shown(path)}: {error.strerror or error}") from error


def exists(path: Path) -> bool:
    """Whether the name is taken, be it by a dangling symbolic link."""
    with _told("look at", path):
        return os.path.lexists(path)


def is_folder(path: Path) -> bool:
    with _told("look at", path):
        return os.path.isdir(path)


def leads_somewhere(path: Path) -> bool:
    """Whether something is there once symbolic links are followed."""
    with _told("look at", path):
        return os.path.exists(path)


def identity(path: Path, descriptor: int | None = None) -> FileIdentity:
    """What the file is now: the one open as ``descriptor``, else the one that ``path`` leads to."""
    with _told("look at", path):
        facts = os.stat(path if descriptor is None else descriptor)
    return FileIdentity(path, facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)


def open_read(path: Path) -> int:
    """A read-only descriptor of a regular file. A FIFO, device, socket or folder is refused without waiting."""
    with _told("open", path):
        descriptor = _open_without_waiting(path)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputRejected(f"{shown(path)} is not a regular file")
    return descriptor


def _open_without_waiting(path: Path) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ENXIO:  # what a socket answers
            raise InputRejected(f"{shown(path)} is not a regular file") from error
        if error.errno == errno.EMFILE and _allow_more_descriptors():
            return os.open(path, flags)
        raise


def _allow_more_descriptors() -> bool:
    """Raise the soft limit to the hard one: checkpoints of hundreds of shards stay open. False if it is there."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return True


def close(descriptor: int) -> None:
    """Close, without complaint: what must reach the disk has been through :func:`fsync` by then."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def pread_into(descriptor: int, out: memoryview, offset: int, path: object = "file") -> None:
    """Fill ``out`` from ``offset`` on, whatever the size of single reads. OperationFailed at an early end."""
    view, done = flat(out), 0
    while done < len(view):
        with _told(f"read at offset {offset + done} of", path):
            got = os.preadv(descriptor, [view[done : done + _MOST]], offset + done)
        if got == 0:
            raise OperationFailed(
                f"{shown(path)} ends early: no byte at offset {offset + done}, {len(view) - done} more were "
                "expected; was it changed meanwhile?"
            )
        done += got


def stretch(read_into: Callable[[memoryview, int], None], start: int, size: int) -> io.BufferedReader:
    """``size`` bytes of what ``read_into(out, offset)`` reads, from ``start`` on, to be read once as a file."""
    return io.BufferedReader(_Stretch(read_into, start, start + size))


class _Stretch(io.RawIOBase):
    def __init__(self, read_into: Callable[[memoryview, int], None], start: int, end: int) -> None:
        self._read_into, self._start, self._end = read_into, start, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._end - self._start))
        self._read_into(view[:count], self._start)
        self._start += count
        return count


def pread_runs(descriptor: int, out: memoryview, offsets: Sequence[int], path: object = "file") -> None:
    """Fill ``out`` with equally long runs of bytes, one from each offset: one call of the system for each."""
    view = flat(out)
    length = len(view) // max(1, len(offsets))
    with _told("read", path):
        for place, offset in enumerate(offsets):
            part = view[place * length : (place + 1) * length]
            if os.preadv(descriptor, [part], offset) != length:
                pread_into(descriptor, part, offset, path)


def pwrite_all(descriptor: int, data: memoryview, offset: int, path: object = "file") -> None:
    """Write all of ``data`` at ``offset``."""
    view, done = flat(data), 0
    with _told("write", path):
        while done < len(view):
            done += os.pwrite(descriptor, view[done : done + _MOST], offset + done)


def flat(view: memoryview) -> memoryview:
    """The bytes of a view of any shape and type."""
    # A view with a zero in its shape cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")


def create(path: Path, size: int = 0) -> int:
    """A new file, preallocated to ``size`` bytes, so that a full disk fails before any work.

    Its mode is 0666 masked by the umask. Nothing is left behind when the space cannot be had.
    """
    with _told("create", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _allocate(descriptor, size, path)
    except BaseException:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    return descriptor


def unnamed(folder: Path) -> int:
    """A new file in ``folder`` without a name, for what does not fit into memory: gone when it is closed."""
    with _told("make a scratch file in", folder):
        descriptor, name = tempfile.mkstemp(dir=folder)
        os.unlink(name)
    return descriptor


def _allocate(descriptor: int, size: int, path: Path) -> None:
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        elif size:
            os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = free_bytes(path.parent)
            reason = f"{size} bytes needed, {free} free: {error.strerror}"
            raise OperationFailed(f"no space for {shown(path)}: {reason}") from error
        raise OperationFailed(f"cannot allocate {shown(path)}: {error.strerror}") from error


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
    call = _libc_function("sync_file_range", "int", "int64", "int64", "uint")
    if call is not None:
        call(descriptor, offset, length, 2)  # SYNC_FILE_RANGE_WRITE; a hint, so its result does not matter


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


def make_way(path: Path) -> None:
    """Make the folders that lead to a new file, where missing."""
    with _told("make the folder", path.parent):
        os.makedirs(path.parent, exist_ok=True)


def files_below(folder: Path) -> list[str]:
    """All files in a folder and those below it, by their paths from it on, sorted."""
    with _told("list", folder):
        return sorted(
            os.path.relpath(os.path.join(home, name), folder) for home, _, names in os.walk(folder) for name in names
        )


def publish_directory(staging: Path, destination: Path) -> None:
    """Give a finished folder its name, at once, never over another; then sync the parent.

    Linux: renameat2 with RENAME_NOREPLACE. Elsewhere a check and a rename, with a window between them in
    which another process could create the destination; an empty one is then replaced, a full one refused.
    """
    for name in dict.fromkeys(os.path.dirname(name) for name in files_below(staging)):
        fsync_directory(staging / name)
    with contextlib.suppress(OSError):
        os.rmdir(destination)
    with _told("publish", destination):
        try:
            if not _rename_noreplace(staging, destination):
                _rename_if_free(staging, destination)
        except FileExistsError as error:
            raise InputRejected(f"{shown(destination)} exists and is not an empty folder") from error
    fsync_directory(destination.parent)


def publish_file(staging: Path, destination: Path) -> None:
    """Give a finished and synced file its name, never over another; then sync the parent. See above."""
    with _told("publish", destination):
        try:
            if not _rename_noreplace(staging, destination):
                _rename_if_free(staging, destination)
        except FileExistsError as error:
            raise InputRejected(f"{shown(destination)} exists already") from error
    fsync_directory(destination.absolute().parent)


def _rename_if_free(source: Path, destination: Path) -> None:
    if os.path.lexists(destination):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    os.rename(source, destination)


def _rename_noreplace(source: Path, destination: Path) -> bool:
    """renameat2(RENAME_NOREPLACE); False where the system or file system does not have it."""
    import ctypes

    call = _libc_function("renameat2", "int", "char_p", "int", "char_p", "uint")
    if call is None:
        return False
    here = -100  # AT_FDCWD
    if call(here, os.fsencode(source), here, os.fsencode(destination), 1) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code))


@cache
def _libc_function(name: str, *kinds: str) -> Any:
    """A function of the C library with arguments of these ctypes kinds; None where it is missing."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is not None:
        function.argtypes = [getattr(ctypes, f"c_{kind}") for kind in kinds]
    return function


def read_small(path: Path, limit: int) -> bytes:
    """All bytes of a regular file. InputRejected above ``limit`` bytes."""
    descriptor = open_read(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise InputRejected(f"{shown(path)} has {size} bytes, at most {limit} are accepted")
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    with _told("write", path):
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)


def cache_folder(part: str) -> Path | None:
    """A private folder in $SMELT_CACHE, else in the user's cache; None when it cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(os.environ.get("SMELT_CACHE") or os.path.join(home, "smelt")) / part
    try:
        make_folders(folder)
        usable = os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid()
    except OperationFailed:
        return None
    return folder if usable else None


def forget(path: Path) -> None:
    """Remove a file of a cache, if it can be."""
    with contextlib.suppress(OSError):
        os.unlink(path)


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

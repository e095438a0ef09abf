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
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import InputRejected, OperationFailed, SyncFailed, show

#: Linux moves at most this many bytes per read or write call.
_MOST = 0x7FFFF000

#: The file in a folder of work that its owner holds a lock on.
LOCK = "smelt.lock"


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
def uninterrupted() -> Iterator[None]:
    """Signals that would end the process wait until the block is done: for what must not be half done. Be brief."""
    waiting: list[tuple[int, Any]] = []
    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if callable(signal.getsignal(number)):
                before[number] = signal.signal(number, lambda *found: waiting.append(found))
    except ValueError:  # not in the main thread, which alone is interrupted
        pass
    try:
        yield
    finally:
        for held, handler in before.items():
            signal.signal(held, handler)
        for came, frame in waiting[:1]:
            before[came](came, frame)


@contextlib.contextmanager
def _told(action: str, path: object) -> Iterator[None]:
    """Turn an OSError into a sentence: what failed, on which path, and why."""
    try:
        yield
    except OSError as error:
        raise OperationFailed(f"cannot {action} {shown(path)}: {error.strerror or error}") from error


def exists(path: Path) -> bool:
    """Whether the name is taken, be it by a dangling symbolic link."""
    return os.path.lexists(path)


def is_folder(path: Path) -> bool:
    return os.path.isdir(path)


def leads_somewhere(path: Path) -> bool:
    """Whether something is there once symbolic links are followed."""
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
    flags = os.O_RDONLY | os.O_NONBLOCK
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
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _allocate(descriptor, size, path)
    except BaseException:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    return descriptor


def reopen(path: Path, size: int) -> int:
    """A file that an earlier run left, brought to ``size`` allocated bytes; as :func:`create` where it is gone."""
    with _told("open", path):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            return create(path, size)
    try:
        with _told("resize", path):
            os.ftruncate(descriptor, size)
        _allocate(descriptor, size, path)
    except BaseException:
        close(descriptor)
        raise
    return descriptor


def append(descriptor: int, data: bytes, path: Path) -> None:
    """Write at the end of a file, and wait until it is on the disk."""
    with _told("look at", path):
        end = os.fstat(descriptor).st_size
    pwrite_all(descriptor, memoryview(data), end, path)
    fsync(descriptor, path)


def truncate(descriptor: int, size: int, path: Path) -> None:
    """Cut an open file to its first ``size`` bytes."""
    with _told("cut", path):
        os.ftruncate(descriptor, size)


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
    """Wait until the file is on the disk. A failure is final, as :class:`SyncFailed` says."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise SyncFailed(f"cannot sync {shown(path)}: {error.strerror or error}") from error


def fsync_directory(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    with _told("open", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fsync(descriptor, path)
    finally:
        close(descriptor)


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


def ensure_folder(path: Path) -> None:
    """Make one folder unless it is there."""
    with _told("make the folder", path), contextlib.suppress(FileExistsError):
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
            os.path.relpath(os.path.join(home, name), folder) for home, names in _walked(folder) for name in names
        )


def _walked(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A folder and all below it, each with its files. Raises OSError, which ``os.walk`` alone would pass over."""

    def told(error: OSError) -> None:
        raise error

    return ((home, names) for home, _, names in os.walk(folder, onerror=told))


def lock_folder(folder: Path, note: bytes) -> int | None:
    """Make a folder unless it is there, and take its lock: a descriptor, or None while another process has it.

    The lock ends with the process, however that ends. ``note`` says in the lock's file who has it.
    """
    while True:
        ensure_folder(folder)
        descriptor = _open_lock(folder)
        if descriptor is None:  # its last owner has just removed the folder
            continue
        free = False
        try:
            free = _try_lock(descriptor)
            if free and _is_at(folder / LOCK, descriptor):
                truncate(descriptor, 0, folder / LOCK)
                pwrite_all(descriptor, memoryview(note), 0, folder / LOCK)
                return descriptor
        except BaseException:
            unlock_folder(folder, descriptor) if free else close(descriptor)
            raise
        close(descriptor)
        if not free:
            return None


def unlock_folder(folder: Path, descriptor: int) -> None:
    """Let go of a folder, and remove it if there is nothing else in it."""
    with contextlib.suppress(OSError):
        os.unlink(folder / LOCK)
        os.rmdir(folder)
    close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a process has the lock of a folder."""
    with _told("open", folder / LOCK), contextlib.suppress(FileNotFoundError):
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
        try:
            return not _try_lock(descriptor)
        finally:
            os.close(descriptor)
    return False


def _open_lock(folder: Path) -> int | None:
    """None where the folder is gone. One that somebody else has put there is refused: its files are theirs."""
    with _told("lock", folder):
        try:
            if os.lstat(folder).st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "it belongs to another user")
            return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            return None
        except OSError:
            with contextlib.suppress(OSError):
                os.rmdir(folder)  # unless something is in it
            raise


def _try_lock(descriptor: int) -> bool:
    """False while another process has the lock. A file system without locks grants all."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise OperationFailed(f"cannot lock: {error.strerror}") from error
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file still has this name."""
    with _told("look at", path), contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    return False


def publish_directory(staging: Path, destination: Path, *, overwrite: bool = False) -> None:
    """Give a finished folder its name, at once, then sync both parents; where that fails, take the name back.

    A name that is taken stays, but for an empty folder: that is what rename does with folders. With ``overwrite``
    the two change places (renameat2 with RENAME_EXCHANGE), so that the old folder is then at ``staging``. Systems
    without that call move the old one there by two renames, between which there is no destination.
    """
    for name in dict.fromkeys(os.path.dirname(name) for name in files_below(staging)):
        fsync_directory(staging / name)
    replaced = overwrite and exists(destination)
    with _told("publish", destination):
        _swap(staging, destination) if replaced else _rename(staging, destination)
    try:
        fsync_directory(destination.parent)
        fsync_directory(staging.parent)  # before anything of what was replaced is removed
    except BaseException as error:
        try:
            _swap(staging, destination) if replaced else os.rename(destination, staging)
        except OSError:
            raise SyncFailed(
                f"{shown(destination)} is in place and whole, but its name may not last: {error}"
            ) from error
        raise


def _rename(source: Path, destination: Path) -> None:
    try:
        os.rename(source, destination)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise InputRejected(f"{shown(destination)} exists and is not an empty folder") from error
        raise


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


def _swap(one: Path, other: Path) -> None:
    """Two folders change places."""
    if _exchange(one, other):
        return
    aside = one.with_name(f"{one.name}.aside")
    os.rename(other, aside)
    try:
        os.rename(one, other)
    except BaseException:
        os.rename(aside, other)
        raise
    os.rename(aside, one)


def _rename_noreplace(source: Path, destination: Path) -> bool:
    """renameat2(RENAME_NOREPLACE); False where the system or file system does not have it."""
    return _renameat2(source, destination, 1)


def _exchange(one: Path, other: Path) -> bool:
    """renameat2(RENAME_EXCHANGE); False where the system or file system does not have it."""
    return _renameat2(one, other, 2)


def _renameat2(one: Path, other: Path, flags: int) -> bool:
    import ctypes

    call = _libc_function("renameat2", "int", "char_p", "int", "char_p", "uint")
    if call is None:
        return False
    here = -100  # AT_FDCWD
    if call(here, os.fsencode(one), here, os.fsencode(other), flags) == 0:
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


def read_start(path: Path, size: int) -> bytes:
    """The first bytes of a regular file; fewer where it has no more."""
    descriptor = open_read(path)
    try:
        data = bytearray(min(size, os.fstat(descriptor).st_size))
        pread_into(descriptor, memoryview(data), 0, path)
        return bytes(data)
    finally:
        os.close(descriptor)


def pieces(path: Path, size: int = 1 << 20) -> Iterator[memoryview]:
    """The bytes of a regular file from its first to its last, a piece at a time; each is gone when the next is read."""
    descriptor = open_read(path)
    try:
        held = memoryview(bytearray(size))
        total = os.fstat(descriptor).st_size
        for offset in range(0, total, size):
            piece = held[: total - offset]
            pread_into(descriptor, piece, offset, path)
            yield piece
    finally:
        close(descriptor)


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


def remove_file(path: Path) -> None:
    with _told("remove", path):
        os.unlink(path)


def allocated(folder: Path) -> int:
    """Bytes of disk that a folder and all in it take; 0 where it is absent."""
    with _told("look at", folder), contextlib.suppress(FileNotFoundError):
        found = [os.lstat(os.path.join(home, name)) for home, names in _walked(folder) for name in names]
        return sum(facts.st_blocks * 512 for facts in found)
    return 0


def modified(path: Path) -> float:
    """When a file or folder was last changed, in seconds since 1970."""
    with _told("look at", path):
        return os.lstat(path).st_mtime


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it; absent is fine."""
    with _told("remove", path), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def free_bytes(path: Path) -> int:
    """Space that an unprivileged process may still use on the file system of ``path``."""
    with _told("look at", path):
        facts = os.statvfs(path)
    return facts.f_bavail * facts.f_frsize

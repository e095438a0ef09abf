"""Faults in the seam to the file system: operations that kill the process, fail, do half their work, or are recorded.

The calls of the operating system that ``smelt.storage`` makes are replaced in this process for good.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.faults.points import Interrupting
from tests.faults.power import Recorder

#: What an operation is called -> the functions of ``os`` that do it.
OPERATIONS = {
    "open": ("open",), "pread": ("preadv",), "pwrite": ("pwrite",), "fallocate": ("posix_fallocate",),
    "fsync": ("fsync",), "rename": ("rename",), "mkdir": ("mkdir",), "unlink": ("unlink", "rmdir"),
    "listdir": ("listdir", "scandir"), "truncate": ("ftruncate",),
}  # fmt: skip


def arm(job: Mapping[str, Any]) -> Failing | Recorder | Interrupting | None:
    """Install the faults that a job asks for; what counts or records is returned, to be saved after the run."""
    if "kill" in job:
        _install_kill(**job["kill"])
    if "tear" in job:
        _install_tear(job["tear"])
    if "short" in job:
        _install_short(job["short"])
    if "mutate" in job:
        _install_mutation(**job["mutate"])
    if "shim" in job:
        _arm_shim(**job["shim"])
    if "record" in job:
        return Recorder(job["record"]).install()
    if "signal" in job:
        return Interrupting(**job["signal"]).install()
    return Failing(**job["fail"]).install() if "fail" in job else None


def wrap(around: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace every operation by what ``around(operation, real function)`` makes of it."""
    from smelt import storage

    for operation, names in OPERATIONS.items():
        for name in names:
            setattr(os, name, around(operation, getattr(os, name)))
    exchange: Callable[..., Any] = storage._exchange
    storage._exchange = around("rename", exchange)


class Failing:
    """The n-th operation of some kinds (all, if none is named) fails, once or from then on."""

    def __init__(self, nth: int, code: str = "EIO", once: bool = True, kinds: Sequence[str] = ()) -> None:
        self._nth, self._code, self._once, self._kinds = nth, getattr(errno, code), once, tuple(kinds)
        self.seen = 0
        self._lock = threading.Lock()

    def install(self) -> Failing:
        wrap(self._around)
        return self

    def save(self, path: str) -> None:
        """How many operations there were."""
        with open(path, "w") as file:
            print(self.seen, file=file)

    def _around(self, operation: str, real: Callable[..., Any]) -> Callable[..., Any]:
        if self._kinds and operation not in self._kinds:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                seen, self.seen = self.seen, self.seen + 1
            if seen == self._nth or (seen > self._nth and not self._once):
                raise OSError(self._code, os.strerror(self._code), _path(arguments))
            return real(*arguments, **options)

        return call


def _path(arguments: tuple[Any, ...]) -> str | None:
    return next((os.fspath(a) for a in arguments if isinstance(a, str | os.PathLike)), None)


def _install_kill(operation: str, nth: int, after: bool = False) -> None:
    """The process is killed just before or after the n-th call of a function of storage."""
    from smelt import storage

    real = getattr(storage, operation)
    calls = iter(range(nth, -1, -1))

    def call(*arguments: Any, **options: Any) -> Any:
        due = next(calls, -1) == 0
        if due and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(storage, operation, call)


def _install_tear(nth: int) -> None:
    """Half of the n-th write is done when the process is killed."""
    write, calls = os.pwrite, iter(range(nth, -1, -1))

    def pwrite(descriptor: int, part: Any, offset: int) -> int:
        if next(calls, -1) == 0:
            write(descriptor, part[: len(part) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, part, offset)

    os.pwrite = pwrite  # type: ignore[assignment]


def _install_short(seed: int) -> None:
    """Reads and writes move a random part of what they were asked to; some are interrupted first."""
    luck, read, write = random.Random(seed), os.preadv, os.pwrite

    def preadv(descriptor: int, parts: Any, offset: int) -> int:
        (part,) = parts
        return read(descriptor, [part[: luck.randint(1, len(part))] if len(part) else part], offset)

    def pwrite(descriptor: int, part: Any, offset: int) -> int:
        return write(descriptor, part[: luck.randint(1, len(part))] if len(part) else part, offset)

    os.preadv, os.pwrite = preadv, pwrite  # type: ignore[assignment]


def _install_mutation(path: str, how: str, nth: int) -> None:
    """Somebody changes an input at the n-th read of the run."""
    read, calls = os.preadv, iter(range(nth, -1, -1))

    def preadv(descriptor: int, parts: Any, offset: int) -> int:
        if next(calls, -1) == 0:
            mutate(Path(path), how)
        return read(descriptor, parts, offset)

    os.preadv = preadv  # type: ignore[assignment]


def mutate(path: Path, how: str) -> None:
    """Truncate, append to, replace, touch or overwrite a file."""
    data = path.read_bytes()
    if how == "truncate":
        os.truncate(path, len(data) // 2)
    elif how == "append":
        with open(path, "ab") as file:
            file.write(b"more")
    elif how == "replace":
        path.with_name("other").write_bytes(data)
        os.replace(path.with_name("other"), path)
    elif how == "touch":
        os.utime(path)
    else:
        with open(path, "r+b") as file:
            file.seek(len(data) - 100)
            file.write(bytes(100))


def _arm_shim(nth: int, code: str, once: bool) -> None:
    """Faults below Python: in the library that stands before the C library (shim.c)."""
    import ctypes

    ctypes.CDLL(None).fault_arm(nth, getattr(errno, code), int(once))

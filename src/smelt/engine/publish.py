"""Write into a work folder beside the destination, and give the result its name when all is on the disk.

``OUT.smelt-work`` belongs to one process at a time, which holds a lock in it. Each attempt has a folder of its
own there: ``new``, which becomes ``OUT``, and whatever helps to continue after a crash.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from .. import storage
from ..errors import InputRejected, OperationFailed, SyncFailed, UsageError, show
from .manifest import NAME as MANIFEST

#: Behind the destination's name.
SUFFIX = ".smelt-work"


def check_destination(out: Path, inputs: list[Path], *, overwrite: bool = False) -> None:
    """Refuse what could damage something: a full folder, a file, an input, a place that cannot be written."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{show(out)} exists and is not a folder: choose another destination")
    held = storage.listdir(out) if out.is_dir() else []
    if held and not overwrite:
        raise UsageError(f"{show(out)} exists and is not empty: choose another destination, or remove it first")
    if held and MANIFEST not in held:
        raise UsageError(f"{show(out)} has no {MANIFEST}: only what smelt made is overwritten; remove it yourself")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{show(parent)} does not exist: make it first, or choose another destination")
    resolved = out.resolve()
    for path in inputs:
        home = path.resolve()
        if resolved == home or home in resolved.parents or resolved in home.parents:
            raise UsageError(f"the destination {show(out)} and the input {show(path)} lie inside each other")


def check_space(out: Path, needed: int) -> None:
    """Refuse before any work when the destination's file system has not enough room."""
    free = storage.free_bytes(out.absolute().parent)
    if needed > free:
        raise OperationFailed(f"not enough disk for {show(out)}: {needed} bytes needed, {free} free")


def work_folder(out: Path) -> Path:
    """Where runs that write ``out`` keep what is not finished."""
    return out.absolute().parent / f"{out.name}{SUFFIX}"


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write and sync small files, whose names may lead to folders below."""
    for name, data in sorted(files.items()):
        storage.make_way(folder / name)
        storage.write_small(folder / name, data)


@contextmanager
def claim(out: Path) -> Iterator[Path]:
    """The work folder of ``out``, for this process alone. InputRejected while another one has it."""
    work = work_folder(out)
    who = {"pid": os.getpid(), "host": platform.node(), "started": round(time.time())}
    lock = None
    try:
        with storage.uninterrupted():
            lock = storage.lock_folder(work, json.dumps(who).encode())
        if lock is None:
            raise InputRejected(
                f"{show(out)} is being written by another process{_owner(work)}: wait for it, or end it"
            )
        yield work
    finally:
        try:
            with storage.uninterrupted():
                if lock is not None:
                    storage.unlock_folder(work, lock)
                lock = None
        except BaseException:
            if lock is not None:  # the signal came before signals were held off
                storage.unlock_folder(work, lock)
            raise


def _owner(work: Path) -> str:
    try:
        told = json.loads(storage.read_small(work / storage.LOCK, 4096))
        return f" (number {told['pid']} on {show(told['host'])})"
    except (OperationFailed, InputRejected, ValueError, KeyError, TypeError):
        return ""


@contextmanager
def staging(
    out: Path, *, work: Path | None = None, name: str | None = None, overwrite: bool = False, keep: bool = False,
    warn: Callable[[str], None] | None = None,
) -> Iterator[Path]:  # fmt: skip
    """A folder next to ``out``; published under that name on success, removed on any failure.

    Parameters
    ----------
    work: the work folder, where the caller has claimed it.
    name: of this attempt: one that an earlier attempt left is yielded with all that is in it.
    overwrite: what is at ``out`` makes room, and is removed.
    keep: leave everything there on failure, unless a sync failed, after which nothing can be relied on.
    warn: is told if something could not be removed after the result is in place.
    """
    with claim(out) if work is None else nullcontext(work) as place:
        home = place / (name or secrets.token_hex(8))
        try:
            storage.ensure_folder(home)
            storage.ensure_folder(home / "new")
            yield home / "new"
            with storage.uninterrupted():
                storage.publish_directory(home / "new", out.absolute(), overwrite=overwrite)
                _discard(home, warn or (lambda message: None))
        except BaseException as error:
            if not keep or isinstance(error, SyncFailed):
                with contextlib.suppress(OperationFailed):  # what went wrong first is what is told
                    storage.remove_tree(home)
            raise


def _discard(home: Path, warn: Callable[[str], None]) -> None:
    """Remove what is no longer needed. The result is in place, so that failing is no failure of the run."""
    try:
        storage.remove_tree(home)
    except OperationFailed as error:
        warn(f"{error}; smelt clean names what was left")

"""Write into a staging folder beside the destination, and give it its name when all is on the disk."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .. import storage
from ..errors import OperationFailed, UsageError, show


def check_destination(out: Path, inputs: list[Path]) -> None:
    """Refuse what could damage something: a full folder, a file, an input, a place that cannot be written."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{show(out)} exists and is not a folder: choose another destination")
    if out.is_dir() and storage.listdir(out):
        raise UsageError(f"{show(out)} exists and is not empty: choose another destination, or remove it first")
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


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write and sync small files, whose names may lead to folders below."""
    for name, data in sorted(files.items()):
        storage.make_way(folder / name)
        storage.write_small(folder / name, data)


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A new folder next to ``out``; published under that name on success, removed on any failure."""
    parent = out.absolute().parent
    folder = parent / f"{out.name}.smelt-{secrets.token_hex(4)}"
    storage.mkdir(folder)
    try:
        yield folder
        storage.publish_directory(folder, out.absolute())
    except BaseException:
        storage.remove_tree(folder)
        raise

"""From what a user names to a checkpoint: a path, a hub id, or a dict of arrays."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputRejected, show
from . import hub
from .base import Checkpoint
from .folder import FolderCheckpoint
from .memory import MemoryCheckpoint


def load(
    source: str | Path | Mapping[str, Any], *, revision: str | None = None, label: str | None = None
) -> Checkpoint:
    """Open a checkpoint lazily: a folder, one .safetensors file, a hub id, or a dict of arrays.

    An existing path is a path, whatever it looks like; the hub is asked only about other names.
    ``owner/name@revision`` and ``revision=`` are the same. Raises InputRejected when it is not a checkpoint.
    """
    if isinstance(source, Mapping):
        return MemoryCheckpoint(source, label or "arrays")
    path = Path(source).expanduser()
    if path.exists() or path.is_symlink():
        return FolderCheckpoint(_readable(path), label or str(source))
    name, _, named = str(source).partition("@")
    if not hub.looks_like_id(name):
        raise InputRejected(f"{show(source)}: no such file or folder{_near(path)}")
    folder, commit = hub.fetch(name, revision or named or None)
    return FolderCheckpoint(folder, label or str(source), commit)


def _readable(path: Path) -> Path:
    if not path.exists():
        raise InputRejected(f"{show(path)} is a link to a file that is not there")
    if path.is_file() and path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise InputRejected(f"{show(path)} is pickled, which can run code when it is read: convert it to safetensors first")
    if path.is_file() and path.suffix == ".gguf":
        raise InputRejected(f"{show(path)} is GGUF, which this version does not read")
    return path


def _near(path: Path) -> str:
    """Names in the parent folder that are close."""
    parent = path.parent
    known = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    nearest = difflib.get_close_matches(path.name, known, n=1)
    return f"; did you mean {show(nearest[0])}?" if nearest else ""

"""A folder with the files of a model, on this machine or elsewhere."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import storage
from ..errors import InputRejected
from .documents import MAX_BYTES, parse_json
from .stored import LocalFile, Stored

_URL = re.compile(r"[A-Za-z][A-Za-z0-9.-]*://.*")


def is_url(text: str) -> bool:
    """Whether a name leads elsewhere, by whatever way."""
    return _URL.fullmatch(text) is not None


def split(text: str) -> tuple[str, str]:
    """``base+adapter`` where either is a URL, whose own + must be told from that; nothing after it where it is none."""
    base, plus, adapter = text.rpartition("+")
    beyond = is_url(adapter) or (base.startswith("hf://") and "+" not in base)
    return (base, adapter) if plus and base and adapter and beyond else (text, "")


class Place(ABC):
    """Where files are looked up by their plain names. ``folder`` is the path of one on this machine."""

    folder: Path | None = None

    #: Whether all files can be listed; else those that are known by name.
    lists: bool = True

    #: Memory that reading its files takes beside what it fills.
    scratch: int = 0

    @abstractmethod
    def shown(self, name: str | None = None) -> str:
        """The place, or a file in it, as messages name it."""

    @abstractmethod
    def names(self) -> list[str]:
        """The files that are there, sorted; of a place that cannot be listed, its weights."""

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return name in self.names()

    @abstractmethod
    def has_folder(self, name: str) -> bool:
        """Whether there is a folder below of this name."""

    @abstractmethod
    def inside(self, name: str) -> Place:
        """A folder below."""

    def beside(self) -> list[str]:
        """The files that may be read whole, sorted."""
        return self.names()

    @abstractmethod
    def small(self, name: str, limit: int) -> bytes | None:
        """A whole file, None where there is none. InputRejected above ``limit`` bytes."""

    @abstractmethod
    def open(self, name: str) -> Stored:
        """A file to be read by position. Raises InputRejected or OperationFailed when it cannot be."""

    def unfinished(self, names: Iterable[str]) -> bool:
        """Whether a download into it was interrupted."""
        return False

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file of at most 64 MiB; an empty one where there is no such file."""
        raw = self.small(name, MAX_BYTES)
        return {} if raw is None else parse_json(raw, self.shown(name))


class LocalPlace(Place):
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path = folder

    def shown(self, name: str | None = None) -> str:
        return storage.shown(self.folder if name is None else self.folder / name)

    def names(self) -> list[str]:
        return storage.listdir(self.folder)

    def has_folder(self, name: str) -> bool:
        return storage.is_folder(self.folder / name)

    def inside(self, name: str) -> Place:
        return LocalPlace(self.folder / name)

    def small(self, name: str, limit: int) -> bytes | None:
        path = present(self.folder / name)
        return storage.read_small(path, limit) if storage.exists(path) else None

    def open(self, name: str) -> Stored:
        return LocalFile(present(self.folder / name))

    def unfinished(self, names: Iterable[str]) -> bool:
        """Whether files wait under the names that huggingface_hub gives to parts, here or in its cache."""
        home = self.folder.parent
        blobs = home.parent / "blobs"
        waiting = storage.listdir(blobs) if home.name == "snapshots" and storage.is_folder(blobs) else []
        return any(name.endswith(".incomplete") for name in (*names, *waiting))


#: A place, and the one file in it that is meant, or None.
Target = tuple[Place, str | None]


def target(path: Path) -> Target:
    """The folder that a path of this machine names, or the file in its folder."""
    return (LocalPlace(path), None) if storage.is_folder(path) else (LocalPlace(path.parent), path.name)


def present(path: Path) -> Path:
    """The same path. InputRejected when it is a link that leads nowhere, as an interrupted download leaves it."""
    if storage.exists(path) and not storage.leads_somewhere(path):
        raise InputRejected(
            f"{storage.shown(path)} is a link to a file that is not there: the download was interrupted, repeat it"
        )
    return path

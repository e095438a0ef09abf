"""The files beside the weights of a folder: tokenizer, configs, templates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from .. import storage

_LARGEST_FILE = 1 << 30  # bytes


class SideFiles(Mapping[str, bytes]):
    """Name -> bytes; listed once, each read when it is asked for."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder or Path()
        self._names = storage.listdir(folder) if folder is not None else []

    def __getitem__(self, name: str) -> bytes:
        if name not in self._names:
            raise KeyError(name)
        return storage.read_small(self._folder / name, _LARGEST_FILE)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # the inherited test would read the file

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

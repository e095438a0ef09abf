"""The files beside the weights: tokenizer, configs, templates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .place import Place

_LARGEST_FILE = 1 << 30  # bytes


class SideFiles(Mapping[str, bytes]):
    """Name -> bytes; listed once, each read when it is asked for. ``more``: files in folders below."""

    def __init__(self, place: Place | None, more: Sequence[str] = ()) -> None:
        self._place = place
        self._names = [*place.beside(), *more] if place is not None else []

    def __getitem__(self, name: str) -> bytes:
        found = self._small(name) if name in self._names else None
        if found is None:
            raise KeyError(name)
        return found

    def _small(self, name: str) -> bytes | None:
        folder, _, own = name.rpartition("/")
        place = self._place.inside(folder) if folder and self._place is not None else self._place
        return None if place is None else place.small(own, _LARGEST_FILE)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # the inherited test would read the file

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

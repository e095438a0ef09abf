"""Folders at the other end of a URL, of whatever kind."""

from __future__ import annotations

from abc import abstractmethod

from ..place import Place
from .blocks import SCRATCH
from .transport import NotThere, patiently


class RemotePlace(Place):
    """Small files are fetched once, with patience, and kept in memory."""

    scratch = SCRATCH

    def __init__(self) -> None:
        self._small: dict[str, bytes | None] = {}

    def small(self, name: str, limit: int) -> bytes | None:
        """As in :class:`Place`. A file that may not be read is taken to be absent."""
        if name not in self._small:
            try:
                self._small[name] = patiently(lambda: self.whole(name, limit), self.shown(name))
            except NotThere:
                self._small[name] = None
        return self._small[name]

    @abstractmethod
    def whole(self, name: str, limit: int) -> bytes:
        """All bytes of a file. Raises Interrupted, NotThere, or InputRejected above ``limit`` bytes."""

"""How the engine tells how far it is; the command line draws it, nothing else needs it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called from several threads."""

    def start(self, total_bytes: int, label: str) -> None:
        """A stage that will move ``total_bytes`` begins."""

    def advance(self, nbytes: int) -> None:
        """So many more bytes have been read or written."""

    def finish(self) -> None:
        """The stage is over, done or not."""


class Silent:
    """Progress that nobody looks at."""

    def start(self, total_bytes: int, label: str) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass

    def finish(self) -> None:
        pass

"""What a way of reaching remote files must offer: the beginning of one, and any range of it."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from ...errors import OperationFailed, SmeltError, show

_T = TypeVar("_T")

#: Seconds before each further try; what succeeds in between starts anew.
PAUSES = [0.5, 1.0, 2.0, 4.0, 8.0]
_LONGEST_PAUSE = 60.0


class Interrupted(Exception):
    """It may succeed if tried again, after so many seconds."""

    def __init__(self, what: str, after: float = 0) -> None:
        super().__init__(what)
        self.after = min(after, _LONGEST_PAUSE)


class NotThere(Exception):
    """There is no such file, or none that may be seen."""


class Beginning(NamedTuple):
    """The first bytes of a file, its size, and what tells its versions apart (empty where nothing does)."""

    head: bytes
    size: int
    version: str


class Transport(ABC):
    """One remote file. ``name`` is how messages name it; ``key`` tells it from others, and may hold secrets."""

    name: str
    key: str

    @abstractmethod
    def begin(self, count: int) -> Beginning:
        """At most ``count`` bytes from the start, and the facts. Raises Interrupted, NotThere or a SmeltError."""

    @abstractmethod
    def fill(self, out: memoryview, offset: int) -> int:
        """Fill ``out`` from ``offset`` on as far as one request goes: how many bytes, at least one.

        Raises Interrupted, NotThere or a SmeltError, also when it is not the same version any more.
        """


def patiently(attempt: Callable[[], _T], name: str) -> _T:
    """What ``attempt`` returns, tried again with growing pauses while it is interrupted."""
    for pause in PAUSES:
        try:
            return attempt()
        except Interrupted as error:
            time.sleep(max(error.after, pause * random.uniform(0.5, 1)))
    try:
        return attempt()
    except Interrupted as error:
        raise OperationFailed(
            f"{show(name, 1000)}: {error}, {len(PAUSES) + 1} times in a row: try again later"
        ) from error


def failure(name: str, error: Exception) -> SmeltError:
    """An unforeseen error of a library, in its own words."""
    return OperationFailed(f"{show(name, 1000)}: {type(error).__name__}: {show(error)}")

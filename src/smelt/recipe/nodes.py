"""A recipe as a tree that still knows where each value was written.

YAML text and plain dicts both become this tree (``documents``), and everything after reads only the tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import show

Scalar = None | bool | int | float | str


@dataclass(frozen=True, slots=True)
class Position:
    """Where a value stands. ``line`` and ``column`` count from 1; both are 0 when the recipe was a dict."""

    origin: str
    line: int = 0
    column: int = 0
    path: str = ""

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}" if self.line else self.path or "the top level"

    def report(self, message: str) -> str:
        """``message`` with the place in front, in the form that editors can jump to."""
        if self.line:
            return f"{self.origin}:{self.line}:{self.column}: {message}"
        return f"{self.origin}: {self.path}: {message}" if self.path else f"{self.origin}: {message}"


@dataclass(frozen=True, slots=True)
class Leaf:
    """A scalar. ``text`` is how it was written; ``plain`` tells that it was written without quotes."""

    position: Position
    value: Scalar
    text: str
    plain: bool = False

    def __str__(self) -> str:
        if self.value is None:
            return "nothing"
        if isinstance(self.value, str):
            return f"the text {show(self.value)}"
        return show(self.text)[1:-1]


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    position: Position
    nodes: tuple[Node, ...]

    def __str__(self) -> str:
        return "a list"


@dataclass(frozen=True, slots=True)
class Fields:
    """A mapping, with the position of each key. ``str()`` of a node says in a message what was found."""

    position: Position
    nodes: dict[str, Node]
    keys: dict[str, Position]

    def __str__(self) -> str:
        return "a mapping"


Node = Leaf | Items | Fields


@dataclass
class Report:
    """Everything that was found wrong with a recipe (problems) or worth telling (notices)."""

    _problems: list[tuple[int, int, str]] = field(default_factory=list)
    _notices: list[tuple[int, int, str]] = field(default_factory=list)

    def fail(self, position: Position, message: str) -> None:
        self._problems.append((position.line, position.column, position.report(message)))

    def note(self, position: Position, message: str) -> None:
        self._notices.append((position.line, position.column, position.report(message)))

    @property
    def problems(self) -> tuple[str, ...]:
        """In the order of the text, each once."""
        return tuple(_in_order(self._problems))

    @property
    def notices(self) -> tuple[str, ...]:
        return tuple(_in_order(self._notices))


def _in_order(found: list[tuple[int, int, str]]) -> Iterator[str]:
    by_place = sorted(found, key=lambda entry: entry[:2])
    return iter(dict.fromkeys(message for _, _, message in by_place))

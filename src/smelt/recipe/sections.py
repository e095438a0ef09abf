"""Reading a mapping of the recipe: only known keys, each of the type it should have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import show
from ..kernels.dtypes import NAMES, name_of
from .nodes import Fields, Items, Leaf, Node, Position, Report
from .scalars import convert
from .settings import HOLE, is_hole
from .words import did_you_mean

#: The only spellings that a recipe may use, as in mergekit.
DTYPE_NAMES = {name: code for name, code in NAMES.items() if name_of(code) == name}


class Section:
    """One mapping. Unknown keys and a node that is no mapping are reported; a key without value is absent."""

    def __init__(self, node: Node, known: Sequence[str], what: str, report: Report, hint: str = "") -> None:
        self.report, self.position, self.what = report, node.position, what
        fields = node if isinstance(node, Fields) else Fields(node.position, {}, {})
        self.malformed = node is not fields or is_hole(node)
        if self.malformed:
            fields = Fields(node.position, {}, {})
            self.wrong(node, f"{what} must be a mapping, found {node}")
        self.nodes = {key: child for key, child in fields.nodes.items() if not _empty(child)}
        self.keys = fields.keys
        for key in fields.nodes:
            if key not in known:
                meant = did_you_mean(key, known) or f"; known here: {', '.join(known)}{hint}"
                report.fail(fields.keys[key], f"unknown key {show(key)} in {what}{meant}")

    def get(self, key: str) -> Node | None:
        return self.nodes.get(key)

    def require(self, key: str) -> Node | None:
        """The value of ``key``; reported when it is missing."""
        if key not in self.nodes and not self.malformed:
            self.fail(key, f"{self.what} needs {key}")
        return self.nodes.get(key)

    def place(self, key: str) -> Position:
        return self.keys.get(key, self.position)

    def fail(self, key: str, message: str) -> None:
        """Report a problem where ``key`` is, or at the mapping's start when it is not there."""
        self.report.fail(self.place(key), message)

    def wrong(self, node: Node, message: str) -> None:
        """Report a problem with a value; a hole has its own message."""
        self.report.fail(node.position, HOLE if is_hole(node) else message)

    def text(self, key: str) -> str | None:
        node = self.get(key)
        if node is None:
            return None
        if isinstance(node, Leaf) and isinstance(node.value, str) and node.value:
            return node.value
        hint = " (quote it to make it text)" if isinstance(node, Leaf) else ""
        self.wrong(node, f"{key} must be text, found {node}{hint}")
        return None

    def word(self, key: str, choices: Iterable[str]) -> str | None:
        """Text that is one of ``choices``."""
        text, known = self.text(key), list(choices)
        if text is None or text in known:
            return text
        meant = did_you_mean(text, known)
        self.wrong(self.nodes[key], f"{key} must be {_one_of(known)}, found {show(text)}{meant}")
        return None

    def dtype(self, key: str) -> str | None:
        """A floating-point dtype as its safetensors code; ``torch.`` in front is allowed."""
        text = self.text(key)
        if text is None:
            return None
        name = text.removeprefix("torch.")
        if name in DTYPE_NAMES:
            return DTYPE_NAMES[name]
        meant = f"; write {name_of(NAMES[name])!r}" if name in NAMES else did_you_mean(name, DTYPE_NAMES)
        self.wrong(self.nodes[key], f"{key} must be {_one_of(DTYPE_NAMES)}, found {show(text)}{meant}")
        return None

    def integer(self, key: str, least: int | None = None) -> int | None:
        """A whole number written as such (``true`` and text are not)."""
        node = self.get(key)
        if node is None:
            return None
        value = node.value if isinstance(node, Leaf) else None
        if isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least):
            return value
        wanted = "an integer" if least is None else f"an integer of at least {least}"
        self.wrong(node, f"{key} must be {wanted}, found {node}")
        return None

    def number(self, key: str) -> float | None:
        value = self._scalar(key, "float")
        return None if value is None else float(value)

    def boolean(self, key: str) -> bool | None:
        value = self._scalar(key, "bool")
        return None if value is None else bool(value)

    def _scalar(self, key: str, kind: str) -> bool | int | float | str | None:
        node = self.get(key)
        if node is None:
            return None
        try:
            return scalar_of(node, kind)
        except ValueError as error:
            self.wrong(node, f"{key}: {error}")
            return None

    def items(self, key: str) -> tuple[Node, ...]:
        """The members of a list; empty when it is absent or no list."""
        node = self.get(key)
        if node is None:
            return ()
        if not isinstance(node, Items):
            self.wrong(node, f"{key} must be a list, found {node}")
            return ()
        return node.nodes


def scalar_of(node: Node, kind: str) -> bool | int | float | str:
    """The value of a leaf as ``kind``. ValueError says what was expected and found."""
    if is_hole(node):
        raise ValueError(HOLE)
    if not isinstance(node, Leaf):
        raise ValueError(f"expected a single value, found {node}")
    return convert(node.value, kind)


def _empty(node: Node) -> bool:
    return isinstance(node, Leaf) and node.value is None


def _one_of(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}"

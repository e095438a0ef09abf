"""YAML text, or a plain dict, to a tree of positioned nodes.

The text is composed, never constructed: no tag can make an object. Limits hold before any work is done in
proportion to what is refused: 1 MB of text, 64 levels, 100 000 nodes after expansion of aliases.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import yaml
from yaml.constructor import ConstructorError, SafeConstructor

from ..errors import UsageError, show
from .nodes import Fields, Items, Leaf, Node, Position, Report, Scalar
from .scalars import is_finite, is_number, number_in

MAX_BYTES = 1_000_000
MAX_DEPTH = 64
MAX_NODES = 100_000

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_TAG = "tag:yaml.org,2002:"
_CONSTRUCTED = {_TAG + kind for kind in ("null", "bool", "int", "float")}
#: Read as the text that was written: a date or a lone "=" can only have been meant as text here.
_TEXTUAL = {_TAG + kind for kind in ("str", "timestamp", "value")}
_MERGE = _TAG + "merge"


def documents(text: str, origin: str, report: Report) -> list[tuple[Node, str]]:
    """The documents of a YAML text: each as a tree, and as the stretch of text it was read from.

    Raises UsageError for text that is not YAML or exceeds a limit; other mistakes go to ``report``.
    """
    text = text.removeprefix("\ufeff")
    start = Position(origin, 1, 1)
    try:
        if len(text.encode()) > MAX_BYTES:
            raise UsageError(start.report(f"a recipe may have {MAX_BYTES} bytes, this has more"))
        cuts = _document_starts(text, origin)
        roots = list(yaml.compose_all(text, Loader=_Loader))
    except yaml.YAMLError as error:
        raise UsageError(_syntax_problem(error, start)) from None
    except UnicodeEncodeError:
        raise UsageError(start.report("a recipe must be valid UTF-8")) from None
    pieces = [text[a:b] for a, b in pairwise([*cuts, len(text)])]
    builder = _FromYaml(origin, report)
    return [(builder.node(root, 1, ""), piece) for root, piece in zip(roots, pieces, strict=True)]


def _document_starts(text: str, origin: str) -> list[int]:
    """Where each document begins. Refuses deep nesting here, because composing recurses."""
    depth = 0
    starts: list[int] = []
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.DocumentStartEvent):
            starts.append(_mark(event).index if starts else 0)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UsageError(_place(origin, event).report(_too_deep()))
    return starts


def _place(origin: str, marked: Any, path: str = "") -> Position:
    mark = _mark(marked)
    return Position(origin, mark.line + 1, mark.column + 1, path)


def _mark(marked: Any) -> Any:
    """Where an event or a node starts (the C parser's marks have no common type with Python's)."""
    return marked.start_mark


def _too_deep() -> str:
    return f"nested more than {MAX_DEPTH} levels deep"


def _syntax_problem(error: yaml.YAMLError, start: Position) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        reason = getattr(error, "reason", None) or "not readable"
        return start.report(f"not valid YAML: {reason}")
    said = " ".join(part for part in (getattr(error, "context", None), error.problem) if part)  # type: ignore[attr-defined]
    return Position(start.origin, mark.line + 1, mark.column + 1).report(f"not valid YAML: {said}")


class _Builder:
    """What both sources share: the limits."""

    def __init__(self, origin: str, report: Report) -> None:
        self.origin, self.report, self.count = origin, report, 0

    def enter(self, position: Position, depth: int) -> None:
        self.count += 1
        if depth > MAX_DEPTH:
            raise UsageError(position.report(_too_deep()))
        if self.count > MAX_NODES:
            raise UsageError(position.report(f"more than {MAX_NODES} values (aliases count as often as they are used)"))


class _FromYaml(_Builder):
    """Composed YAML nodes to our nodes."""

    def node(self, node: yaml.Node, depth: int, path: str) -> Node:
        position = _place(self.origin, node, path)
        self.enter(position, depth)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            nodes, keys = self.entries(node, depth, path)
            return Fields(position, nodes, keys)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return Items(position, tuple(self.node(n, depth + 1, f"{path}[{i}]") for i, n in enumerate(node.value)))
        if isinstance(node, yaml.ScalarNode) and node.tag in _TEXTUAL | _CONSTRUCTED:
            return self.leaf(node, position)
        self.report.fail(position, f"the tag {show(_short(node.tag))} is not allowed in a recipe")
        return Leaf(position, None, "")

    def leaf(self, node: yaml.ScalarNode, position: Position) -> Leaf:
        value: Scalar = node.value
        if node.tag in _CONSTRUCTED:
            try:
                value = SafeConstructor().construct_object(node)
            except (ValueError, KeyError, ConstructorError):
                self.report.fail(position, f"{show(node.value, 40)} is not a valid {_short(node.tag)[2:]}")
                value = None
        if is_number(value) and is_finite(value) and number_in(node.value) != value:
            self.report.note(position, f"{show(node.value)} is read as the number {value}, as YAML 1.1 has it")
        return Leaf(position, value, node.value, plain=not node.style)

    def entries(self, mapping: yaml.MappingNode, depth: int, path: str) -> tuple[dict[str, Node], dict[str, Position]]:
        """The own entries of a mapping and, below them, what ``<<`` merges in."""
        nodes: dict[str, Node] = {}
        keys: dict[str, Position] = {}
        merged: list[yaml.Node] = []
        for key, value in mapping.value:
            place = _place(self.origin, key, path)
            if key.tag == _MERGE:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            elif not isinstance(key, yaml.ScalarNode):
                self.report.fail(place, "a key must be a word")
            elif key.value in nodes:
                self.report.fail(place, f"the key {show(key.value)} is given twice (first in {keys[key.value]})")
            else:
                keys[key.value] = place
                nodes[key.value] = self.node(value, depth + 1, _join(path, key.value))
        for source in merged:
            self.merge(source, nodes, keys, depth, path)
        return nodes, keys

    def merge(
        self, source: yaml.Node, nodes: dict[str, Node], keys: dict[str, Position], depth: int, path: str
    ) -> None:
        place = _place(self.origin, source, path)
        self.enter(place, depth + 1)
        if not isinstance(source, yaml.MappingNode):
            self.report.fail(place, "<< takes a mapping, or a list of mappings")
            return
        more, places = self.entries(source, depth + 1, path)
        for key in more:
            nodes.setdefault(key, more[key])
            keys.setdefault(key, places[key])


def _short(tag: str) -> str:
    return "!!" + tag.removeprefix(_TAG) if tag.startswith(_TAG) else tag


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def from_plain(data: object, origin: str, report: Report) -> Node:
    """The tree of a plain dict (as JSON or YAML would load it). Positions are key paths.

    Raises UsageError when a limit is exceeded (a dict that holds itself is nested too deep).
    """
    return _FromPlain(origin, report).node(data, 1, "")


class _FromPlain(_Builder):
    """Dicts, lists, numbers (numpy's too), text and paths to our nodes."""

    def node(self, data: object, depth: int, path: str) -> Node:
        position = Position(self.origin, path=path)
        self.enter(position, depth)
        if isinstance(data, Mapping):
            nodes = {str(key): self.node(value, depth + 1, _join(path, str(key))) for key, value in data.items()}
            return Fields(position, nodes, {key: Position(self.origin, path=_join(path, key)) for key in nodes})
        if isinstance(data, Sequence) and not isinstance(data, str | bytes):
            return Items(position, tuple(self.node(n, depth + 1, f"{path}[{i}]") for i, n in enumerate(data)))
        value = self.scalar(data, position)
        return Leaf(position, value, str(value))

    def scalar(self, data: object, position: Position) -> Scalar:
        if data is None or isinstance(data, bool | int | float | str):
            return data
        if isinstance(data, os.PathLike):
            return os.fsdecode(data)
        if isinstance(data, Integral):
            return int(data)
        if isinstance(data, Real):
            return float(data)
        self.report.fail(position, f"a recipe cannot hold a {type(data).__name__}")
        return None


def to_plain(node: Node) -> Any:
    """The node as dicts, lists and scalars."""
    if isinstance(node, Fields):
        return {key: to_plain(child) for key, child in node.nodes.items()}
    if isinstance(node, Items):
        return [to_plain(child) for child in node.nodes]
    return node.value


def canonical(nodes: Iterable[Node]) -> str:
    """One text for equal trees, whatever the order of their keys."""
    return json.dumps([to_plain(node) for node in nodes], sort_keys=True)

"""A setting: the value of a method's parameter, which may vary with depth and with the tensor's name.

0.5                                   the same everywhere
[0, 0.5, 1]                           a gradient over the layers
{filter: mlp, value: 0.5}             a condition: tensors whose name contains "mlp"
[{filter: mlp, value: [0, 1]}, ...]   conditions: the first that matches wins
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import floor

from ..errors import show
from .nodes import Fields, Items, Leaf, Node, Position, Report
from .scalars import is_finite, is_number, number_in
from .words import did_you_mean


@dataclass(frozen=True, slots=True)
class Value:
    """A scalar and where it was written."""

    value: bool | int | float | str
    position: Position = field(compare=False)


@dataclass(frozen=True, slots=True)
class Condition:
    """Values for the tensors whose name contains ``filter`` (None: all). One value, or a gradient."""

    gradient: tuple[Value, ...]
    filter: str | None
    position: Position = field(compare=False)

    def matches(self, tensor_name: str) -> bool:
        """Substring test, case-sensitive; there are no wildcards but a filter that is exactly ``*``."""
        return self.filter is None or self.filter == "*" or self.filter in tensor_name

    def at(self, t: float) -> bool | int | float | str | None:
        """The gradient's value at depth ``t`` in [0, 1]; None when it has no values."""
        return interpolate([entry.value for entry in self.gradient], t) if self.gradient else None


@dataclass(frozen=True, slots=True)
class Setting:
    """The value of one parameter at one level of a recipe. A bare scalar is a single condition."""

    conditions: tuple[Condition, ...]
    position: Position = field(compare=False)

    def resolve(self, t: float, tensor_name: str) -> bool | int | float | str | None:
        """The scalar for one tensor; None when nothing is set for it here.

        t: the layer's depth within its slice, in [0, 1] (``depth_in_slice``).
        tensor_name: of the input for a per-model parameter, of the output for a shared one.
        """
        for condition in self.conditions:
            if condition.matches(tensor_name):
                return condition.at(t)
        return None

    def values(self) -> Iterator[Value]:
        """Every scalar written in this setting. Gradients stay between their values, so to check the
        type and the range of these is to check all that ``resolve`` can give."""
        return (value for condition in self.conditions for value in condition.gradient)

    def filters(self) -> Iterator[tuple[str, Position]]:
        """The filters in use, with their places."""
        for condition in self.conditions:
            if condition.filter not in (None, "*"):
                yield str(condition.filter), condition.position

    def words(self) -> tuple[str, ...]:
        """The whole list, for a parameter that is a list of words. ValueError when it is anything else."""
        values = [entry.value for entry in self.values()]
        if any(condition.filter is not None for condition in self.conditions):
            raise ValueError("expected a list of words, found conditions")
        if not all(isinstance(value, str) for value in values):
            raise ValueError("expected a list of words")
        return tuple(str(value) for value in values)


def interpolate(gradient: list[bool | int | float | str], t: float) -> bool | int | float | str:
    """Piecewise linear at ``t``; booleans and words step instead. A quoted number counts as a number."""
    along = t * (len(gradient) - 1)
    i = floor(along)
    fraction = along - i
    if fraction == 0:
        return gradient[i]
    left, right = _as_number(gradient[i]), _as_number(gradient[i + 1])
    if left is None or right is None or any(_as_number(value) is None for value in gradient):
        return gradient[i]
    return (1 - fraction) * left + fraction * right


def _as_number(value: bool | int | float | str) -> int | float | None:
    if isinstance(value, str):
        return number_in(value)
    return value if is_number(value) else None


# --- reading --------------------------------------------------------------------------------------------

_HOLES = {"search", "choice"}
HOLE = (
    "a hole ({search: ...} or {choice: ...}) makes this recipe a search space: it goes to search, "
    "which is not part of this version"
)  # fmt: skip


def is_hole(node: Node) -> bool:
    """Whether ``node`` stands for a value to be searched."""
    return isinstance(node, Fields) and not _HOLES.isdisjoint(node.nodes)


def read_settings(node: Node, report: Report, what: str = "parameters") -> dict[str, Setting]:
    """A ``parameters`` section, or another of the same form. What is wrong goes to ``report`` and is left out."""
    if not isinstance(node, Fields):
        report.fail(node.position, f"{what} must be a mapping name: value, found {node}")
        return {}
    read = {name: read_setting(child, report) for name, child in node.nodes.items()}
    return {name: setting for name, setting in read.items() if setting is not None}


def read_setting(node: Node, report: Report) -> Setting | None:
    """One setting, or None when it is wrong (``report`` tells)."""
    if isinstance(node, Items) and node.nodes and all(_is_condition(child) for child in node.nodes):
        read = [_condition(child, report) for child in node.nodes if isinstance(child, Fields)]
        return Setting(tuple(condition for condition in read if condition), node.position)
    if isinstance(node, Items) and any(_is_condition(child) for child in node.nodes):
        report.fail(node.position, "a list holds either plain values (a gradient) or conditions, not both")
        return None
    if isinstance(node, Fields) and not is_hole(node):
        condition = _condition(node, report)
        return Setting((condition,), node.position) if condition else None
    values = _values(node, report)
    if values is None:
        return None
    conditions = (Condition(values, None, node.position),) if values else ()
    return Setting(conditions, node.position)


def _is_condition(node: Node) -> bool:
    return isinstance(node, Fields) and not is_hole(node)


def _condition(node: Fields, report: Report) -> Condition | None:
    for key in node.nodes:
        if key not in ("value", "filter"):
            hint = did_you_mean(key, ("value", "filter")) or "; a condition has value and filter"
            report.fail(node.keys[key], f"unknown key {show(key)} in a condition{hint}")
    if "value" not in node.nodes:
        report.fail(node.position, "a condition needs a value")
        return None
    values = _values(node.nodes["value"], report)
    chosen = node.nodes.get("filter")
    if chosen is None or (isinstance(chosen, Leaf) and chosen.value is None):
        return None if values is None else Condition(values, None, node.position)
    if not isinstance(chosen, Leaf) or not isinstance(chosen.value, str):
        report.fail(chosen.position, f"a filter must be text, found {chosen} (quote it to make it text)")
        return None
    return None if values is None else Condition(values, chosen.value, chosen.position)


def _values(node: Node, report: Report) -> tuple[Value, ...] | None:
    """A scalar or a gradient."""
    nodes = node.nodes if isinstance(node, Items) else (node,)
    values = [_value(child, report) for child in nodes]
    return None if None in values else tuple(value for value in values if value is not None)


def _value(node: Node, report: Report) -> Value | None:
    problem = _problem_with(node)
    if problem or not isinstance(node, Leaf) or node.value is None:
        report.fail(node.position, problem or f"expected a value, found {node}")
        return None
    spelt = number_in(node.value) if node.plain and isinstance(node.value, str) else None
    if spelt is None:
        return Value(node.value, node.position)
    report.note(node.position, f"{node.text} is text in YAML 1.1; read as the number {spelt!r}")
    return Value(spelt, node.position)


def _problem_with(node: Node) -> str | None:
    if is_hole(node):
        return HOLE
    if not isinstance(node, Leaf) or node.value is None:
        return f"expected a number, true, false or text, found {node}"
    number = number_in(node.value) if isinstance(node.value, str) else node.value
    if number is None or is_finite(number):
        return None
    return f"NaN, infinite and too large numbers are not allowed, found {node}"

"""What a recipe means: the value of each parameter for each layer and group of tensors, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple

from .outputs import Output
from .planning import Plan


@dataclass(frozen=True)
class Row:
    """Tensors that are treated alike.

    ``where``: "model.layers 0-3", or empty outside of the layers; ``tensors``: what they are called there
    ("*" for all of them, also for numbers); ``action``: "merge" or "copy (reason)"; ``values``: parameter ->
    value, or one value per merged model.
    """

    where: str
    tensors: tuple[str, ...]
    action: str
    values: Mapping[str, Any] = field(default_factory=dict)


class FilterUse(NamedTuple):
    """A filter: where the recipe has it, for which parameter (or "only"), and which output tensors it matches."""

    place: str
    parameter: str
    text: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """What one plan does with which tensors. ``constant``: values that hold for all merged tensors."""

    method: str
    variant: str
    base: str | None
    models: tuple[str, ...]
    constant: Mapping[str, Any]
    rows: tuple[Row, ...]
    filters: tuple[FilterUse, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "filters": [use._asdict() for use in self.filters]}


def explain(plan: Plan) -> Explanation:
    """The meaning of a plan's recipe, layer by layer."""
    base, entries = plan.recipe.base_model, [given.model.text for _, given in plan.recipe.inputs()]
    merged = plan.method.base != "ignored" and base is not None and base.text
    rows = tuple(_rows(plan))
    first, *others = [row.values for row in rows if row.action == "merge"] or [{}]
    constant = {name: value for name, value in first.items() if all(more.get(name) == value for more in others)}
    varying = tuple(
        Row(row.where, row.tensors, row.action, {k: v for k, v in row.values.items() if k not in constant})
        for row in rows
    )
    return Explanation(
        plan.method.name, plan.variant, None if base is None else base.text,
        tuple(dict.fromkeys(text for text in entries if text != merged)), constant, varying, tuple(_filters(plan)),
    )  # fmt: skip


#: First and last layer of a stack ("" outside of the layers) that are treated alike, and how (as text).
_Run = tuple[str, int, int, str]


def _rows(plan: Plan) -> Iterator[Row]:
    """What lies outside of the layers, then stack by stack; what is treated alike is one row."""
    treated: dict[tuple[str, str], list[tuple[int, str]]] = {}
    rows: dict[str, Row] = {}
    for output in plan.outputs:
        stack, layer, rest = plan.inputs.donor.structure.place(output.name)
        row = _treatment(output)
        rows.setdefault(key := repr(row), row)
        treated.setdefault((stack, rest), []).append((layer, key))
    runs: dict[_Run, list[str]] = {}
    for (stack, rest), layers in treated.items():
        for key, run in groupby(sorted(layers), key=lambda entry: entry[1]):
            span = [layer for layer, _ in run]
            runs.setdefault((stack, span[0], span[-1], key), []).append(rest)
    for (stack, first, last, key), names in sorted(runs.items()):
        alone = sum(len(other) for (s, a, b, _), other in runs.items() if s == stack and a <= last and first <= b)
        yield replace(rows[key], where=_where(stack, first, last), tensors=_called(names, alone == len(names)))


def _treatment(output: Output) -> Row:
    if output.tensor is None:
        return Row("", (), f"copy ({output.piece.why})" if output.piece.why else "copy")
    tensor = output.tensor
    return Row("", (), "merge", {**tensor.shared, **{name: list(values) for name, values in tensor.each.items()}})


def _where(stack: str, first: int, last: int) -> str:
    return "" if not stack else f"{stack} {first}" if first == last else f"{stack} {first}-{last}"


def _called(names: Sequence[str], everything: bool) -> tuple[str, ...]:
    """Short names: without ".weight", numbers (of experts) as "*", or "*" where there is no other treatment."""
    if everything:
        return ("*",)
    short = (name.removesuffix(".weight").split(".") for name in names)
    return tuple(dict.fromkeys(".".join("*" if part.isdigit() else part for part in parts) for parts in short))


def _filters(plan: Plan) -> Iterator[FilterUse]:
    """Every filter of the recipe with what it matches among the names that it is tested on."""
    sources = {output.name: {source.name for source in output.piece.sources} for output in plan.outputs}
    for _, name, setting, _ in plan.recipe.all_settings():
        for text, position in setting.filters():
            found = (each for each, tested in sources.items() if any(text in own for own in (each, *tested)))
            yield FilterUse(str(position), name, text, tuple(found))
    for chosen in plan.recipe.only:
        yield FilterUse(str(chosen.position), "only", str(chosen.filter), tuple(filter(chosen.matches, sources)))

"""A recipe's parameters against a method's: checked before anything is read, then resolved per tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import UsageError
from ..methods import REQUIRED, Method, Parameter
from ..methods.lines import AFTER_A_METHOD, wrapped
from ..methods.registry import EVERY
from ..recipe import Recipe, Setting, convert, did_you_mean, levels, resolve_parameter
from .layout import Piece, Source
from .parameters import lines_of, unknown_parameter


def check_settings(recipe: Recipe, method: Method) -> list[str]:
    """Every wrong name, place, type and range among the recipe's parameters, with line and column."""
    known = {parameter.name: parameter for parameter in method.all_parameters}
    problems = []
    for _, name, setting, level in recipe.all_settings():
        parameter = known.get(name)
        if parameter is None:
            hint = did_you_mean(name, known)
            problems.append(setting.position.report(f"{method.name} has no parameter {name!r}{hint}"))
        elif level == "source" and not parameter.per_model:
            problems.append(setting.position.report(f"{name} holds for all models: move it to the top level"))
        else:
            problems += _check_values(parameter, setting)
    return problems or _idle(recipe, method)


def check_lines(recipe: Recipe) -> list[str]:
    """Every wrong name, type and range in the section ``lines``, with line and column."""
    known = {parameter.name: parameter for parameter in AFTER_A_METHOD.parameters}
    problems: list[str] = []
    for name, setting in (recipe.lines or {}).items():
        if name in known:
            problems += _check_values(known[name], setting)
        else:
            problems.append(setting.position.report(unknown_parameter(AFTER_A_METHOD, name)))
    if recipe.lines is not None and recipe.in_parts:
        problems.append(recipe.position("lines").report("lines has no effect on the parts of a result"))
    return problems


def with_lines(recipe: Recipe, method: Method) -> Method:
    """The method, followed by what the section ``lines`` asks for. UsageError with its place."""
    if recipe.lines is None:
        return method
    kinds = {parameter.name: parameter.kind for parameter in AFTER_A_METHOD.parameters}
    values = {name: convert(next(setting.values()).value, kinds[name]) for name, setting in recipe.lines.items()}
    try:
        return wrapped(method, lines_of(values, 1))
    except UsageError as error:
        raise UsageError(recipe.position("lines").report(str(error))) from error


def _idle(recipe: Recipe, method: Method) -> list[str]:
    """Settings that would have no effect beside the others."""
    places = {placed.name: placed.setting.position for placed in recipe.all_settings()}
    known = {parameter.name: parameter for parameter in method.parameters}
    variant = variant_of(recipe, method)

    def value_of(name: str) -> Any:
        if name == "variant":
            return variant
        if name == "task" and recipe.in_parts:
            return EVERY
        value = recipe.parameters[name].resolve(0.0, "") if name in recipe.parameters else None
        return known[name].default_for(variant) if value is None else convert(value, known[name].kind)

    idle = [(text.partition(" ")[0], text) for text in method.idle(places, value_of)]
    return [places[name].report(f"{method.name}: {text}") for name, text in idle]


def _check_values(parameter: Parameter, setting: Setting) -> Iterator[str]:
    if parameter.kind == "strings":
        try:
            problem = parameter.problem_with(setting.words())
        except ValueError as error:
            problem = f"{parameter.name}: {error}"
        if problem:
            yield setting.position.report(problem)
        return
    for entry in setting.values():
        try:
            problem = parameter.problem_with(convert(entry.value, parameter.kind))
        except ValueError as error:
            problem = f"{parameter.name}: {error}"
        if problem:
            yield entry.position.report(problem)


def variant_of(recipe: Recipe, method: Method) -> str:
    """``variant:`` if the recipe says it; mergekit's flavour when every key is one that mergekit has.

    So a recipe that people have on disk gives mergekit's numbers, and one that uses what only smelt has
    follows the paper.
    """
    if len(method.variants) < 2:
        return method.variants[0]
    used = {setting.name for setting in recipe.all_settings()}
    if "variant" in recipe.parameters:
        return str(recipe.parameters["variant"].resolve(0.0, ""))
    theirs = {parameter.name for parameter in method.parameters if parameter.mergekit}
    plain = used <= theirs and recipe.scope is None and recipe.lines is None
    return "mergekit" if plain and "mergekit" in method.variants else method.variants[0]


class Resolver:
    """The values of all parameters for each output tensor."""

    def __init__(self, recipe: Recipe, method: Method) -> None:
        self._recipe = recipe
        self._method = method
        self.variant = variant_of(recipe, method)
        self._missing: dict[str, None] = {}
        self._measured: dict[tuple[Any, ...], dict[str, float]] = {}

    def shared(self, piece: Piece) -> dict[str, Any]:
        """Values of the shared parameters for one output tensor."""
        values: dict[str, Any] = {}
        for parameter in self._method.all_parameters:
            if not parameter.per_model:
                values[parameter.name] = self._value(parameter, piece, None)
        return {**values, **self._fixed()}

    def _fixed(self) -> dict[str, Any]:
        """What the recipe says outside ``parameters``."""
        fixed: dict[str, Any] = {"variant": self.variant} if len(self._method.variants) > 1 else {}
        if self._recipe.scope is not None:
            fixed["scope"] = self._recipe.scope
        if self._recipe.in_parts:
            fixed["task"] = EVERY
        return fixed

    def each(self, piece: Piece, merged: Sequence[Source]) -> dict[str, tuple[Any, ...]]:
        """Values of the per-model parameters, one per merged source."""
        return {
            parameter.name: tuple(self._value(parameter, piece, source) for source in merged)
            for parameter in self._method.all_parameters
            if parameter.per_model
        }

    def _value(self, parameter: Parameter, piece: Piece, source: Source | None) -> Any:
        entry = source.entry if source is not None else None
        asked = levels(self._recipe, source=entry, piece=piece.part, module=piece.module)
        if parameter.kind == "strings":
            return next(
                (level[parameter.name].words() for level in asked if parameter.name in level),
                parameter.default,
            )
        name = source.name if source is not None else piece.name
        value = resolve_parameter(parameter.name, asked, tensor_name=name, t=piece.t)
        if value is None and source is not None:
            value = self._measure(piece, source).get(parameter.name)
        if value is None:
            value = parameter.default_for(self.variant)
        if value is REQUIRED:
            owner = f" for {source.input.label}" if source is not None else ""
            self._missing[f"{self._method.name}: {parameter.name} is required{owner} (tensor {piece.name})"] = None
            return 1.0
        return None if value is None else convert(value, parameter.kind)

    def _measure(self, piece: Piece, source: Source) -> dict[str, float]:
        """What the method finds in files beside a model, read once for each choice of the shared parameters."""
        if self._method.measure is None:
            return {}
        shared, item = self.shared(piece), source.input
        key = (item.label, *shared.items())
        if key not in self._measured:
            self._measured[key] = self._method.measure(shared, item.label, item.checkpoint.folder)
        return self._measured[key]

    def measured(self) -> tuple[tuple[str, dict[str, float]], ...]:
        """(model, values) for all that was found in files."""
        return tuple((key[0], values) for key, values in self._measured.items() if values)

    def raise_missing(self) -> None:
        """UsageError naming the parameters that had no value, one tensor each as an example."""
        seen: dict[str, str] = {}
        for message in self._missing:
            seen.setdefault(message.partition(" (tensor")[0], message)
        UsageError.gather(seen.values())


def unmatched_filters(recipe: Recipe, sources: Sequence[str], outputs: Sequence[str]) -> list[str]:
    """Filters that no tensor name contains: most likely a typing error."""
    settings = [(found, sources) for placed in recipe.all_settings() for found in placed.setting.filters()]
    chosen = [((str(each.filter), each.position), outputs) for each in recipe.only if each.filter != "*"]
    return [
        position.report(f"filter {text!r} matches no tensor")
        for (text, position), names in (*settings, *chosen)
        if not any(text in name for name in names)
    ]


def whole_model_values(method: Method, views: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    """With whole-model statistics every parameter must be the same for all tensors: those that are not."""
    if not views:
        return []
    shared, each = views[0]
    varying = {
        name
        for other_shared, other_each in views
        for name in {**shared, **each}
        if other_shared.get(name) != shared.get(name) or other_each.get(name) != each.get(name)
    }
    return [
        f"{method.name} with whole-model statistics: {name} must be the same for all tensors, no gradient or filter"
        for name in sorted(varying)
    ]

"""The catalogue of merge methods: what each is called, takes, needs and comes from.

A method is one file beside this one that ends in a :class:`Method` record. The command line, the docs and
the checks of a recipe are all made from these records.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ..errors import UsageError, show
from ..kernels.program import Output, Request
from .tensors import Model, Tensor

#: Stands for "there is no default": the user must give the value.
REQUIRED: Any = type("Required", (), {"__repr__": lambda self: "required"})()

#: The value of ``task`` while all parts are made.
EVERY = -1

#: ``strings`` are regular expressions.
Kind = Literal["float", "int", "bool", "str", "strings"]
Steps = Generator[tuple[Request, ...], list[Any], Any]


@dataclass(frozen=True)
class Parameter:
    """One knob of a method. ``per_model`` parameters take one value per model (the base excepted).

    A default of None stands for one that depends on the rest; ``help`` says on what.
    ``low`` and ``high`` bound a number, inclusive unless ``open_low``; ``choices`` bound a word.
    ``mergekit`` tells whether mergekit's method has it too, ``defaults`` where a variant's default differs,
    ``when`` (another parameter, its values) under which choices alone it has an effect; no values: under any.
    """

    name: str
    kind: Kind
    default: Any
    help: str
    per_model: bool = False
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    choices: tuple[str, ...] = ()
    mergekit: bool = True
    defaults: tuple[tuple[str, Any], ...] = ()
    when: tuple[str, tuple[Any, ...]] | None = None

    def default_for(self, variant: str) -> Any:
        return dict(self.defaults).get(variant, self.default)

    def problem_with(self, value: Any) -> str | None:
        """What is wrong with ``value``, or None."""
        expected = {"float": (int, float), "int": (int,), "bool": (bool,), "str": (str,), "strings": (tuple,)}
        if not isinstance(value, expected[self.kind]) or (self.kind != "bool" and isinstance(value, bool)):
            return f"{self.name} must be a {self.kind}, not {value!r}"
        if self.choices and value not in self.choices:
            return f"{self.name} must be one of {', '.join(self.choices)}, not {value!r}"
        if isinstance(value, int | float) and not isinstance(value, bool):
            return self._out_of_range(value)
        return self._bad_pattern(value) if isinstance(value, tuple) else None

    def _bad_pattern(self, patterns: tuple[Any, ...]) -> str | None:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, TypeError, RecursionError, OverflowError) as error:
                return f"{self.name}: {show(pattern)} is not a regular expression: {error}"
        return None

    def _out_of_range(self, value: float) -> str | None:
        below = self.low is not None and (value < self.low or (self.open_low and value == self.low))
        if below or (self.high is not None and value > self.high):
            return f"{self.name} must lie in {self.range}, not {value!r}"
        return None if value == value and abs(value) != float("inf") else f"{self.name} must be finite"

    @property
    def range(self) -> str:
        """The interval in the usual notation, or an empty text."""
        if self.low is None and self.high is None:
            return "|".join(self.choices)
        left = "(-inf" if self.low is None else f"{'(' if self.open_low else '['}{self.low:g}"
        return left + ", " + ("inf)" if self.high is None else f"{self.high:g}]")


@dataclass(frozen=True)
class Citation:
    """Where a method was published."""

    title: str
    authors: str
    venue: str
    url: str

    def __str__(self) -> str:
        return f"{self.authors.removesuffix('.')}. {self.title}. {self.venue}. {self.url}"


@dataclass(frozen=True)
class Statistic:
    """One kind of number that was measured on data and weights a method's parameters, tensor by tensor.

    ``shape`` is that of each tensor's statistic: "tensor" (as the weight), "columns" (the length of its last
    axis), "square" (that length twice), "number" (one element). ``also`` are kinds that serve as well.
    ``factored``: may be stored as the sums of its rows and of its columns (kinds ``_row``, ``_col``).
    ``when`` (a parameter, its values) tells under which choices alone it is used. ``single``: one checkpoint
    serves all models. ``partial``: only some tensors have it. ``signed``: may be negative.
    """

    kind: str
    shape: Literal["tensor", "columns", "square", "number"] = "tensor"
    also: tuple[str, ...] = ()
    factored: bool = False
    when: tuple[str, tuple[Any, ...]] | None = None
    single: bool = False
    partial: bool = False
    signed: bool = False

    def __str__(self) -> str:
        return self.kind

    def used(self, shared: Mapping[str, Any]) -> bool:
        """Whether a merge with these shared parameters looks at it."""
        return self.when is None or shared.get(self.when[0]) in self.when[1]


@dataclass(frozen=True)
class Running:
    """How a merge is continued: models change a state that is as large as one of them, and the result follows from it.

    ``state`` gives a tensor's state after its models, in float32 (float64 where an input is): from ``tensor.before``
    on, the stored state of the models that came before, where there is one. Where ``tensor.state`` is set, ``survey``
    and ``merge`` find the result from it, and nothing of earlier models. ``numbers``: what of the survey's answer is
    stored beside it, and is ``model.before`` of the next survey. ``obstacle`` tells from the shared parameters why a
    merge cannot be continued. Merging at once and one by one must give the same bits.
    """

    state: Callable[[Tensor], Output]
    numbers: Callable[[Any], dict[str, float]] = lambda known: {}
    obstacle: Callable[[Mapping[str, Any]], str | None] = lambda shared: None


@dataclass(frozen=True)
class Method:
    """One published way to combine tensors.

    ``merge`` is a coroutine over one tensor (or a plain function when it needs no statistics): it yields
    requests, receives their results and returns the call that makes the output. ``survey`` does the same
    once over the whole model, before any tensor; what it returns reaches ``merge`` as ``tensor.survey``.
    A tensor without one of the ``statistics`` reaches ``merge`` only if the parameter ``missing`` is not "error".
    ``parts`` gives, for methods whose result is more than one model, the outputs that it is made of by name.
    ``needs_layers``: it means nothing where no tensor is known to belong to a layer.
    ``passes`` tells, from the parameters, how often all inputs are read for the survey and how often each
    tensor is gone through for statistics. ``holds`` tells what a tensor takes in memory beside its operands and
    its result: the length of the rows that are held whole, and bytes per element of these. ``low_rank`` tells
    whether a tensor with ``ranks`` is merged from its ``changes``, the models unread. ``searches`` tells how many
    order statistics (Rank, Top) are looked for at once. ``keeps_excluded`` tells whose tensor stands where one is
    excluded: the base's, the model's where there is only one, or the first model's. ``measure`` finds what a recipe
    leaves to files: from the shared parameters, a model's name in the recipe and its folder, values of per-model
    parameters. ``running``: for methods whose result can be continued.
    """

    name: str
    title: str
    summary: str
    advice: str
    citation: Citation
    merge: Callable[[Tensor], Steps | Output]
    parameters: tuple[Parameter, ...] = ()
    base: Literal["required", "optional", "ignored"] = "required"
    min_models: int = 1
    max_models: int | None = None
    survey: Callable[[Model], Steps] | None = None
    passes: Callable[[dict[str, Any]], tuple[int, int]] = lambda parameters: (0, 0)
    parts: Callable[[Tensor], dict[str, Output]] | None = None
    needs_layers: bool = False
    holds: Callable[[Tensor], tuple[int, int]] = lambda tensor: (1, 0)
    low_rank: Callable[[Tensor], bool] = lambda tensor: False
    searches: Callable[[Tensor], int] = lambda tensor: 0
    random: bool = False
    statistics: tuple[Statistic, ...] = ()
    variants: tuple[str, ...] = ("paper",)
    keeps_excluded: Literal["base", "model", "first"] = "base"
    measure: Callable[[Mapping[str, Any], str, Path | None], dict[str, float]] | None = None
    running: Running | None = None

    def check_layers(self, tensors: Iterable[Tensor]) -> None:
        """UsageError where layers are needed and no tensor has one."""
        if self.needs_layers and all(tensor.role is None or tensor.role.layer is None for tensor in tensors):
            raise UsageError(
                f"{self.title}: no tensor is known to belong to a layer: give config.json (config in memory) "
                "with the number of layers"
            )

    def keeper(self, models: int, task: int | None) -> int | None:
        """Which model an excluded tensor is taken from; None: the base."""
        if task is not None:
            return task
        return 0 if self.keeps_excluded == "first" or (self.keeps_excluded == "model" and models == 1) else None

    def parameter(self, name: str) -> Parameter | None:
        return next((parameter for parameter in self.parameters if parameter.name == name), None)

    def idle(self, given: Iterable[str], value_of: Callable[[str], Any]) -> list[str]:
        """Parameters that were given though they have no effect beside the others: one sentence each."""
        chosen = [parameter for parameter in self.parameters if parameter.name in set(given)]
        return [
            f"{parameter.name} has no effect {_beside(parameter.when[0], value_of(parameter.when[0]))}"
            for parameter in chosen
            if parameter.when is not None and not _among(value_of(parameter.when[0]), parameter.when[1])
        ]

    @property
    def all_parameters(self) -> tuple[Parameter, ...]:
        """The method's own parameters and, where there is a choice, ``variant``."""
        if len(self.variants) < 2:
            return self.parameters
        return (*self.parameters, variant_parameter(self.variants))


def _among(value: Any, values: tuple[str, ...]) -> bool:
    return value in values if values else value is not None


def _beside(name: str, value: Any) -> str:
    if name == "task" and value == EVERY:
        return "where the parts of all tasks are made"
    return f"without {name}" if value is None else f"with {name}: {value}"


def variant_parameter(variants: tuple[str, ...]) -> Parameter:
    help_text = "whose flavour: the paper's own, or that of another implementation"
    return Parameter("variant", "str", variants[0], help_text, choices=variants, mergekit=False)


def weight_parameter(default: Any = REQUIRED, **more: Any) -> Parameter:
    """The usual per-model factor."""
    return Parameter("weight", "float", default, "factor of each model", per_model=True, **more)


#: Parameters that many methods share, said once.
LAMBDA = Parameter("lambda", "float", 1.0, "factor of the merged task vector")
EXCLUDE = Parameter(
    "exclude", "strings", (), "regular expressions, anchored at the start: such tensors are not merged",
    mergekit=False,
)  # fmt: skip
SCOPE = Parameter(
    "scope", "str", "model", "whether order statistics span a tensor or the whole model",
    choices=("model", "tensor"), mergekit=False, defaults=(("mergekit", "tensor"),),
    when=("variant", ("paper",)),
)  # fmt: skip


@cache
def catalogue() -> dict[str, Method]:
    """All methods by name, sorted: one file of this package may define several (``METHODS``)."""
    package = importlib.import_module(__package__)
    found: dict[str, Method] = {}
    for module in pkgutil.iter_modules(package.__path__):
        methods = getattr(importlib.import_module(f"{__package__}.{module.name}"), "METHODS", ())
        found.update({method.name: method for method in methods})
    return dict(sorted(found.items()))


def get(name: str) -> Method:
    """The method called ``name``. UsageError with the nearest names when there is none."""
    methods = catalogue()
    if name not in methods:
        from ..recipe import did_you_mean

        raise UsageError(f"unknown merge method {name!r}{did_you_mean(name, methods)}")
    return methods[name]


def names() -> list[str]:
    return list(catalogue())

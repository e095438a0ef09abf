"""Check the parameters of a method, and give each tensor its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError
from ..methods.lines import AFTER_A_METHOD, Lines
from ..methods.registry import EVERY, REQUIRED, Method, Parameter
from ..recipe import did_you_mean


def constant_parameters(
    method: Method,
    parameters: Mapping[str, Any],
    per_model: Mapping[str, Sequence[Any]],
    models: int,
    parts: bool = False,
) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """(shared, each) when one value holds for all tensors; every mistake is reported at once.

    A per-model parameter may be given in ``parameters`` as one number for all models. ``parts``: every task's
    parts are made.
    """
    problems = [unknown_parameter(method, name) for name in [*parameters, *per_model] if not _known(method, name)]
    variant = str(parameters.get("variant", method.variants[0]))
    shared: dict[str, Any] = {}
    each: dict[str, tuple[Any, ...]] = {}
    for parameter in method.all_parameters:
        values, found = _values(parameter, variant, parameters, per_model, models)
        problems += [f"{method.name}: {problem}" for problem in found]
        if parameter.per_model:
            each[parameter.name] = values
        elif values:
            shared[parameter.name] = values[0]
    if parts:
        problems += parts_problems(method, "task" in parameters)
        shared["task"] = EVERY
    problems += [f"{method.name}: {text}" for text in method.idle([*parameters, *per_model], shared.get)]
    UsageError.gather(dict.fromkeys(problems))
    return shared, each


def lines_of(values: Mapping[str, Any], models: int) -> Lines:
    """The section ``lines``, checked."""
    shared, _ = constant_parameters(AFTER_A_METHOD, values, {}, models)
    if shared["alpha"] is not None and "norm" in values:
        raise UsageError("lines: norm has no effect where alpha is given")
    return Lines(**shared)


def parts_problems(method: Method, task_given: bool) -> list[str]:
    """What is wrong with asking for the parts that a result is made of."""
    if method.parts is None:
        return [f"{method.name} has no parts per task: its result is one model"]
    return [f"{method.name}: task has no effect where the parts of all tasks are made"] if task_given else []


def _known(method: Method, name: str) -> bool:
    return any(parameter.name == name for parameter in method.all_parameters)


def unknown_parameter(method: Method, name: str) -> str:
    known = [parameter.name for parameter in method.all_parameters]
    return f"{method.name} has no parameter {name!r}{did_you_mean(name, known)}"


def _values(
    parameter: Parameter,
    variant: str,
    parameters: Mapping[str, Any],
    per_model: Mapping[str, Sequence[Any]],
    models: int,
) -> tuple[tuple[Any, ...], list[str]]:
    """The values of one parameter (one per model, or a single one), and what is wrong with them."""
    name, wanted = parameter.name, models if parameter.per_model else 1
    if name in per_model:
        values = tuple(per_model[name])
        if not parameter.per_model:
            return (), [f"{name} is shared by all models: give it in parameters"]
        if len(values) != models:
            return (), [f"{name}: {len(values)} values for {models} models"]
    else:
        values = (parameters.get(name, parameter.default_for(variant)),) * wanted
    values = tuple(tuple(value) if isinstance(value, list) else value for value in values)
    if any(value is REQUIRED for value in values):
        return (), [f"{name} is required{' for each model' if parameter.per_model else ''}"]
    given = (value for value in values if value is not None or parameter.default_for(variant) is not None)
    return values, [problem for value in given if (problem := parameter.problem_with(value))]


def check_counts(method: Method, models: int, has_base: bool) -> list[str]:
    """What is wrong with the number of models, or with the presence of a base."""
    problems = []
    if method.base == "required" and not has_base:
        problems.append(f"{method.name} needs a base model: add base_model")
    most = method.max_models if method.max_models is not None else models
    if not method.min_models <= models <= most:
        wanted = str(method.min_models) if method.min_models == most else f"{method.min_models} to {most}"
        if method.max_models is None:
            wanted = f"at least {method.min_models}"
        problems.append(f"{method.name} takes {wanted} model(s) beside the base, {models} were given")
    return problems

"""``smelt methods``: what can be asked for in a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .options import common, json_option
from .output import print_json, print_pairs, print_table

if TYPE_CHECKING:
    from ..methods import Method, Parameter


LEGEND = """\
statistics: data that must be given beside the models. reads: how often the inputs are read in all.
ns: CPU time per element of input, all passes together, as measured on one machine."""


@click.command(short_help="The merge methods, their parameters and papers.")
@click.argument("name", required=False)
@json_option
@common
def command(name: str | None, as_json: bool) -> None:
    """List the merge methods, or tell everything about the one called NAME."""
    from .. import methods

    if name is not None:
        method = methods.get(name)
        print_json(describe(method)) if as_json else _show_one(method)
        return
    known = [methods.get(each) for each in methods.names()]
    if as_json:
        print_json([describe(method) for method in known])
    else:
        columns = (
            "method",
            "what it does",
            "base",
            ">models",
            "statistics",
            "random",
            ">reads",
            ">ns",
            "when to use it",
        )
        print_table(columns, [comparison(method) for method in known])
        print(f"\n{LEGEND}")


def comparison(method: Method) -> tuple[str, ...]:
    """One line of the table that compares the methods."""
    facts = describe(method)
    return (
        method.name, method.summary, method.base, _model_count(method), statistics_of(method),
        "yes" if method.random else "", str(reads(facts["passes"])), _cost(facts["cost"]), method.advice,
    )  # fmt: skip


def statistics_of(method: Method) -> str:
    """Whether statistics have to be given with the defaults of the first variant."""
    if not method.statistics:
        return ""
    return "needed" if any(statistic.used(_defaults(method)) for statistic in method.statistics) else "optional"


def _defaults(method: Method) -> dict[str, Any]:
    variant = method.variants[0]
    return {parameter.name: parameter.default_for(variant) for parameter in method.all_parameters}


def reads(passes: dict[str, int]) -> int:
    """How often the inputs are read: for the whole model, for each tensor, and for the output."""
    return passes["whole_model"] + passes["per_tensor"] + 1


def _cost(nanoseconds: float | None) -> str:
    return "" if nanoseconds is None else f"{nanoseconds:g}"


def _model_count(method: Method) -> str:
    most = method.max_models
    return f"{method.min_models}+" if most is None else f"{method.min_models}-{most}"


def _show_one(method: Method) -> None:
    facts = describe(method)
    print(f"{method.name}: {method.title}\n\n{method.summary}\n{method.advice}\n")
    needs = facts["passes"]
    print_pairs(
        {
            "base": method.base,
            "models": _model_count(method) + (" beside the base" if method.base == "required" else ""),
            "random": "yes: set seed" if method.random else "no",
            "passes": f"{needs['whole_model']} over the model, {needs['per_tensor']} per tensor, one to merge",
            "variants": ", ".join(method.variants),
            "statistics": ", ".join(map(str, method.statistics)) or "none",
            "paper": str(method.citation),
        }
    )
    print()
    columns = ("parameter", "type", ">default", "range", "per model", "meaning")
    print_table(columns, [_parameter_row(parameter, method) for parameter in method.all_parameters])


def _parameter_row(parameter: Parameter, method: Method) -> tuple[str, ...]:
    defaults = {variant: _text(parameter.default_for(variant)) for variant in method.variants}
    same = len(set(defaults.values())) == 1
    default = next(iter(defaults.values())) if same else ", ".join(f"{v}: {d}" for v, d in defaults.items())
    each = "yes" if parameter.per_model else ""
    return parameter.name, parameter.kind, default, parameter.range, each, parameter.help


def _text(default: Any) -> str:
    if default is None:
        return "unset"
    return "none" if default == () else str(default).lower() if isinstance(default, bool) else str(default)


def describe(method: Method) -> dict[str, Any]:
    """A method as plain data. Passes are those of the defaults of the first variant; the cost is in ns per element."""
    from ..methods.costs import cost_of

    return {
        "name": method.name,
        "title": method.title,
        "summary": method.summary,
        "advice": method.advice,
        "base": method.base,
        "min_models": method.min_models,
        "max_models": method.max_models,
        "random": method.random,
        "statistics": [statistic.kind for statistic in method.statistics],
        "variants": list(method.variants),
        "passes": _passes(method),
        "cost": cost_of(method.name),
        "parameters": [_describe_parameter(parameter, method) for parameter in method.all_parameters],
        "citation": {
            "authors": method.citation.authors,
            "title": method.citation.title,
            "venue": method.citation.venue,
            "url": method.citation.url,
        },
    }


def _passes(method: Method) -> dict[str, int]:
    whole, each = method.passes(_defaults(method))
    return {"whole_model": whole, "per_tensor": each}


def _describe_parameter(parameter: Parameter, method: Method) -> dict[str, Any]:
    from ..methods import REQUIRED

    defaults = {variant: parameter.default_for(variant) for variant in method.variants}
    return {
        "name": parameter.name,
        "type": parameter.kind,
        "required": REQUIRED in defaults.values(),
        "default": {variant: None if value is REQUIRED else value for variant, value in defaults.items()},
        "range": parameter.range,
        "choices": list(parameter.choices),
        "per_model": parameter.per_model,
        "mergekit": parameter.mergekit,
        "help": parameter.help,
    }

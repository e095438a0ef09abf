"""``smelt explain``: what a recipe means, before any weight is read."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from .merge import recipe_argument
from .options import common, json_option, pickle_option
from .output import plain, print_json, print_pairs, print_table

if TYPE_CHECKING:
    from ..engine.explain import Explanation, FilterUse, Row


@click.command(short_help="What a recipe does with each tensor.")
@click.argument("recipe")
@click.option("--raw", is_flag=True, help="Bare tensors: no config, no layers, no ties, no side files.")
@click.option(
    "--on-extra", type=click.Choice(["copy", "drop", "merge", "error"]), default="error", show_default=True,
    help="A tensor that only some models have.",
)  # fmt: skip
@pickle_option
@json_option
@common
def command(recipe: str, raw: bool, on_extra: str, allow_pickle: bool, as_json: bool) -> None:
    """Show the value of every parameter for each layer and group of tensors, as RECIPE (a file, or -) gives it.

    Needs the models' headers, not their weights. Tells also what each filter of the recipe matches.
    """
    from ..engine import plan
    from ..engine.explain import explain

    planned = plan(recipe_argument(recipe), raw=raw, on_extra=on_extra, allow_pickle=allow_pickle)
    explained = [explain(each) for each in (*planned.stages, planned)]
    notices = [notice for each in (*planned.stages, planned) for notice in each.notices]
    planned.close()
    if as_json:
        print_json([each.as_dict() for each in explained])
        return
    for each in explained:
        _show(each)
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)


def _show(explained: Explanation) -> None:
    print_pairs(
        {
            "method": f"{explained.method} ({explained.variant})",
            "base": plain(explained.base) if explained.base else "none",
            "models": ", ".join(map(plain, explained.models)),
            **{name: _text(value) for name, value in explained.constant.items() if name != "variant"},
        }
    )
    print()
    varying = sorted({name for row in explained.rows for name in row.values})
    columns = ("layers", "tensors", "action", *varying)
    print_table(columns, [_cells(row, varying) for row in explained.rows])
    if explained.filters:
        heads = ("filter", "of", "in the recipe", ">tensors", "the first")
        print_table(heads, [_filter_cells(use) for use in explained.filters])


def _filter_cells(use: FilterUse) -> tuple[str, ...]:
    first = plain(use.tensors[0]) if use.tensors else "none"
    return plain(use.text), use.parameter, use.place, str(len(use.tensors)), first


def _cells(row: Row, varying: list[str]) -> tuple[str, ...]:
    names = ", ".join(map(plain, row.tensors))
    return plain(row.where) or "-", names, row.action, *(_text(row.values.get(name, "-")) for name in varying)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else plain(value)

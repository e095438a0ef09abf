"""``smelt check``: can these models be merged, and how best?"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

import click

from .options import common, json_option, pickle_option, settings
from .output import plain, print_json, print_table
from .progress import bar

if TYPE_CHECKING:
    from ..diagnosis import Diagnosis
    from ..diagnosis.result import LayerRow, ModelRow

_REJECTED = 3


@click.command(short_help="Can these models be merged, and how best?")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--base", metavar="MODEL", help="The model that the others were fine-tuned from.")
@click.option("--full", is_flag=True, help="Read every weight, not a sample of large models.")
@pickle_option
@json_option
@common
@click.pass_context
def command(
    ctx: click.Context, models: tuple[str, ...], base: str | None, full: bool, allow_pickle: bool, as_json: bool
) -> None:
    """Compare MODELs (folders, files, hub ids or URLs) and say whether and how to merge them.

    Exit code 3 when something forbids a merge.
    """
    from ..diagnosis import check

    sample: Literal["full", "auto"] = "full" if full else "auto"
    diagnosis = check(models, base, sample=sample, progress=bar(settings().quiet), allow_pickle=allow_pickle)
    if as_json:
        print_json(diagnosis.as_dict())
    else:
        _show(diagnosis)
    ctx.exit(0 if diagnosis.mergeable else _REJECTED)


def _show(diagnosis: Diagnosis) -> None:
    for finding in diagnosis.findings:
        print(f"{finding.severity}: {finding.message}")
    if not diagnosis.findings:
        print("nothing speaks against merging these models")
    print()
    _show_candidates(diagnosis)
    if diagnosis.overall is not None:
        _show_vectors(diagnosis, diagnosis.overall)
    _show_advice(diagnosis)


def _show_candidates(diagnosis: Diagnosis) -> None:
    if len(diagnosis.candidates) < 3:
        return
    rows = [
        (plain(candidate.label), f"{candidate.distance:.4f}", _number(candidate.agreement))
        for candidate in diagnosis.candidates
    ]
    print_table(("as the base", ">mean distance", ">mean cosine of the others"), rows)


def _show_vectors(diagnosis: Diagnosis, overall: LayerRow) -> None:
    columns = ("task vector", ">norm / base", ">p50", ">p99", ">max", ">zeros")
    print_table(columns, [_model_cells(row) for row in overall.models])
    if overall.pairs:
        rows = [(plain(p.a), plain(p.b), _number(p.cosine), _percent(p.conflict)) for p in overall.pairs]
        print_table(("model", "model", ">cosine", ">sign conflicts"), rows)
    pairs = bool(overall.pairs)
    columns = ("layer", ">norm / base", ">p99", *((">cosines", ">sign conflicts") if pairs else ()))
    print_table(columns, [_layer_cells(row) for row in diagnosis.layers])
    read = f"{diagnosis.tensors} tensors, {diagnosis.share_read:.1%} of the weights read"
    print(f"base {plain(diagnosis.base)}; {read}")
    print()


def _model_cells(row: ModelRow) -> tuple[str, ...]:
    magnitudes = (f"{value:.2e}" for value in (row.p50, row.p99, row.largest))
    return plain(row.model), _number(row.ratio, 4), *magnitudes, _percent(row.zeros)


def _layer_cells(row: LayerRow) -> tuple[str, ...]:
    """One line per layer: the range over models or pairs."""
    cells = [plain(row.layer)]
    cells.append(_range([model.ratio for model in row.models], ".4f"))
    cells.append(_range([model.p99 for model in row.models], ".1e"))
    if row.pairs:
        cells.append(_range([pair.cosine for pair in row.pairs], "z.2f"))
        cells.append(_range([pair.conflict for pair in row.pairs], ".0%"))
    return tuple(cells)


def _range(values: list[float], form: str) -> str:
    known = [value for value in values if value == value]
    if not known:
        return "-"
    low, high = format(min(known), form), format(max(known), form)
    return low if low == high else f"{low} .. {high}"


def _number(value: float, places: int = 3) -> str:
    return "-" if value != value else f"{value:z.{places}f}"


def _percent(value: float) -> str:
    return "-" if value != value else f"{value:.1%}"


def _show_advice(diagnosis: Diagnosis) -> None:
    advice = diagnosis.advice
    if advice is None:
        print("no recipe: see the errors above" if not diagnosis.mergeable else "no recipe: nothing to merge")
        return
    print(f"Start with {advice.method}:")
    for reason in advice.reasons:
        print(f"  {reason}")
    for method, why in advice.alternatives:
        print(f"  or {method}: {why}")
    print()
    sys.stdout.write(advice.recipe)

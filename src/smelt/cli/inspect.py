"""``smelt inspect``: what a checkpoint holds."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from .options import common, json_option, pickle_option, settings
from .output import count, plain, print_json, print_pairs, print_table, size
from .progress import bar

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint


@click.command(short_help="What a checkpoint holds.")
@click.argument("model")
@click.option("--tensors", is_flag=True, help="List every tensor with dtype, shape and file.")
@click.option("--roles", is_flag=True, help="List every tensor with its role, layer and depth.")
@click.option("--stats", is_flag=True, help="Read every tensor: range, mean magnitude, zeros, NaN and Inf.")
@pickle_option
@json_option
@common
def command(model: str, tensors: bool, roles: bool, stats: bool, allow_pickle: bool, as_json: bool) -> None:
    """Tell what MODEL (a folder, file, hub id or URL; base+adapter; an adapter) holds, from its headers and config."""
    from ..checkpoint import AdapterGiven, load
    from ..diagnosis.contents import contents, tensor_rows
    from ..diagnosis.layers import structure_of

    try:
        opened = load(model, allow_pickle=allow_pickle)
    except AdapterGiven:
        _tell_adapter(model, allow_pickle, as_json)
        return
    with opened as checkpoint:
        structure = structure_of(checkpoint)
        facts = contents(checkpoint, structure)
        if tensors or roles or stats:
            facts["tensor_table"] = tensor_rows(checkpoint, structure)
        if stats:
            _add_values(checkpoint, facts["tensor_table"])
    if as_json:
        print_json(facts)
        return
    _show(facts)
    columns = ["dtype", "shape", "file"] if tensors else []
    columns += ["role", "layer", "expert", "depth"] if roles else []
    columns += ["lowest", "highest", "mean_magnitude", "zeros", "nonfinite"] if stats else []
    if columns:
        _show_tensors(facts["tensor_table"], columns)


def _tell_adapter(source: str, allow_pickle: bool, as_json: bool) -> None:
    from ..checkpoint import open_adapter
    from ..diagnosis.contents import adapter_contents

    adapter = open_adapter(source, allow_pickle=allow_pickle)
    with adapter.file:
        facts = adapter_contents(adapter)
    if as_json:
        print_json(facts)
        return
    ranks = [f"{rank} ({number} modules)" for rank, number in facts["ranks"].items()]
    print_pairs(
        {
            "adapter": plain(facts["model"]) + (f" @ {facts['revision']}" if facts["revision"] else ""),
            "kind": facts["kind"],
            "made for": plain(facts["base"] or "not said"),
            "tensors changed": str(facts["modules"]),
            "rank": ", ".join(ranks) or "none",
            "stored whole": ", ".join(map(plain, facts["stored_whole"])) or "nothing",
            "parameters": count(facts["parameters"]),
            "size": f"{size(facts['bytes'])} in {len(facts['files'])} file(s)",
        }
    )
    print()
    _show_totals("dtype", facts["dtypes"])


def _add_values(checkpoint: Checkpoint, rows: Sequence[dict[str, Any]]) -> None:
    from ..diagnosis.values import Values, readable, values_of
    from ..engine.progress import Silent

    progress = bar(settings().quiet) or Silent()
    progress.start(sum(info.nbytes for info in checkpoint.tensors.values()), "reading")
    for row in rows:
        known = readable(row["dtype"])
        row |= (values_of(checkpoint, row["name"], progress) if known else Values()).as_dict()
    progress.finish()


def _show(facts: Mapping[str, Any]) -> None:
    stacks = [f"{stack['layers']} in {plain(stack['prefix'])}" for stack in facts["stacks"]]
    tied = [" = ".join(map(plain, group)) for group in facts["tied"]]
    print_pairs(
        {
            "model": plain(facts["model"]) + (f" @ {facts['revision']}" if facts["revision"] else ""),
            "parameters": count(facts["parameters"]),
            "tensors": str(facts["tensors"]),
            "size": f"{size(facts['bytes'])} in {len(facts['files'])} file(s)",
            **({"parts": ", ".join(map(plain, facts["parts"]))} if len(facts["parts"]) > 1 else {}),
            "layers": ", ".join(stacks) or "none found",
            "heads": ", ".join(map(plain, facts["heads"])) or "none stored",
            "tied": ", ".join(tied) or "nothing stored twice",
            **{name.replace("_", " "): plain(value) for name, value in facts["config"].items()},
        }
    )
    print()
    _show_totals("dtype", facts["dtypes"])
    _show_totals("role", facts["roles"])
    for notice in facts["notices"]:
        print(f"note: {notice}", file=sys.stderr)


def _show_totals(what: str, totals: Mapping[str, Mapping[str, int]]) -> None:
    rows = [
        (plain(key), str(total["tensors"]), count(total["elements"]), size(total["bytes"]))
        for key, total in totals.items()
    ]
    print_table((what, ">tensors", ">elements", ">size"), rows)


def _show_tensors(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    heads = [column if column in ("dtype", "shape", "file", "role") else f">{column}" for column in columns]
    cells = [[plain(row["name"]), *(_cell(row[column]) for column in columns)] for row in rows]
    print_table(["tensor", *(head.replace("_", " ") for head in heads)], cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else plain(value)

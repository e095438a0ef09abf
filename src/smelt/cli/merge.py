"""``smelt merge``: run a recipe, or show what it would do."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError, show
from ..storage import listdir
from .options import common, dry_run_option, json_option, pickle_option, settings
from .output import duration, plain, print_json, print_pairs, print_table, size
from .progress import bar

if TYPE_CHECKING:
    from ..engine import Artifact, Plan
    from ..recipe import Recipe


@click.command(short_help="Run a recipe: merge models into a new folder.")
@click.argument("words", nargs=-1, metavar="RECIPE [OUT]")
@click.option("--continue", "merged", metavar="MERGED", help="Add to what was merged with --save-state: MODEL... OUT.")
@click.option("--base", metavar="PATH", help="With --continue: where the base is, if not where the recipe says.")
@click.option("--save-state", is_flag=True, help="Write what --continue needs, too: a float32 copy of what is merged.")
@dry_run_option
@click.option("--memory", default="1GiB", metavar="SIZE", show_default=True, help="Budget for buffers.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: the cores this process may use.")
@click.option("--device", default="cpu", metavar="NAME", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--seed", type=click.IntRange(min=0), help="Overrides the recipe's seed.")
@click.option("--shard-size", metavar="SIZE", help="Largest weight file. Default: the recipe's, else 5GB.")
@click.option(
    "--on-extra", type=click.Choice(["copy", "drop", "merge", "error"]), default="error", show_default=True,
    help="A tensor that only some models have.",
)  # fmt: skip
@click.option(
    "--on-nonfinite", type=click.Choice(["error", "warn", "allow"]), default="error", show_default=True,
    help="NaN or Inf in inputs or result.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Merge models that do not share a backbone all the same.")
@click.option("--strict", is_flag=True, help="Warnings about the inputs are errors.")
@click.option("--raw", is_flag=True, help="Bare tensors: no config, no layers, no ties, no side files.")
@click.option("--stages", metavar="DIR", help="Keep the results of stages here, for a later run to find.")
@click.option(
    "--unsafe-truncate-embeddings", "truncate_embeddings", is_flag=True,
    help="Cut embeddings of different vocabularies to their common length.",
)  # fmt: skip
@click.option("--card/--no-card", default=True, help="Write README.md, the model card.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if smelt has made it: at once, when the new one is whole.")
@click.option(
    "--resume/--no-resume", default=None,
    help="Keep what is written when the run fails, to continue it; begin anew. Default: continue what was killed.",
)  # fmt: skip
@pickle_option
@json_option
@common
@click.pass_context
def command(
    ctx: click.Context, /, words: tuple[str, ...], merged: str | None, base: str | None, dry_run: bool, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Merge models as RECIPE says (a YAML file, or - for stdin) into OUT, a folder that does not exist yet.

    The folder appears when everything is written and synced, or not at all. Prints its path. What a killed run
    has finished is taken up by the next one of the same recipe, options and files; see smelt clean.

    smelt merge --continue MERGED MODEL... OUT adds models to a merge that has saved its state, which stays as it is.
    The bits are those of merging all of them at once; what changes bits is settled by MERGED.
    """
    if merged is not None:
        if len(words) < 2:
            raise click.UsageError("--continue MERGED takes the models to add and OUT: name two folders at least")
        _continue(merged, words, dry_run, as_json, {"base": base, **_given(ctx, options)})
        return
    recipe, out = _recipe_and_out(words, base, dry_run)
    source = recipe_argument(recipe)
    if dry_run:
        from ..engine import plan

        show_plan(plan(source, **options), as_json)
        return
    from ..engine import merge

    artifact = merge(source, str(out), progress=bar(settings().quiet), **options)
    show_artifact(artifact, as_json)


def _recipe_and_out(words: Sequence[str], base: str | None, dry_run: bool) -> tuple[str, str | None]:
    if base is not None:
        raise click.UsageError("--base has no effect without --continue: the recipe names the base")
    if not words:
        raise click.UsageError("Missing argument 'RECIPE'.")
    if len(words) > 2:
        raise click.UsageError(f"got unexpected extra arguments ({' '.join(words[2:])}): models stand in the recipe")
    if len(words) < 2 and not dry_run:
        raise click.UsageError("OUT is missing: name the folder to create, or add --dry-run")
    return words[0], words[1] if len(words) > 1 else None


def _given(ctx: click.Context, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are on the command line: the others are those of the merge that is continued."""
    from click.core import ParameterSource

    return {
        name: value for name, value in options.items() if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }


def _continue(merged: str, words: Sequence[str], dry_run: bool, as_json: bool, options: dict[str, Any]) -> None:
    *added, out = words
    if dry_run:
        from ..engine import plan_continued

        show_plan(plan_continued(merged, added, **options), as_json)
        return
    from ..engine import continue_merge

    artifact = continue_merge(merged, added, out, progress=bar(settings().quiet), **options)
    show_artifact(artifact, as_json)


def recipe_argument(argument: str) -> str | Sequence[Recipe]:
    """What the engine takes: a path, or the recipes read from stdin."""
    from ..recipe import did_you_mean, parse

    if argument == "-":
        return parse(sys.stdin.read(), "<stdin>")
    path = Path(argument)
    if not path.is_file():
        neighbours = listdir(path.parent) if path.parent.is_dir() else []
        raise UsageError(f"no such recipe file: {show(argument)}{did_you_mean(path.name, neighbours)}")
    return argument


def show_artifact(artifact: Artifact, as_json: bool) -> None:
    """The path on stdout, what happened on stderr."""
    if not settings().quiet:
        for warning in artifact.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        moved = artifact.bytes_read + artifact.bytes_written
        rate = moved / max(artifact.seconds, 1e-9) / 1e9
        print(
            f"{artifact.tensors} tensors, {size(artifact.bytes_read)} read, {size(artifact.bytes_written)} "
            f"written in {duration(artifact.seconds)} ({rate:.2f} GB/s)",
            file=sys.stderr,
        )
    print_json(artifact.as_dict()) if as_json else print(artifact.path)


def show_plan(plan: Plan, as_json: bool) -> None:
    facts = plan.as_dict()
    plan.close()
    if as_json:
        print_json(facts)
        return
    columns = ("output tensor", "dtype", "shape", ">size", "action", "per model")
    print_table(columns, [_row(row) for row in facts["rows"]])
    passes = facts["passes"]
    stages = [f"{stage['method']} of {', '.join(map(plain, stage['inputs']))}" for stage in facts["stages"]]
    print_pairs(
        {
            "method": f"{facts['method']} ({facts['variant']})",
            **({"stages before": "; ".join(stages)} if stages else {}),
            "tensors": str(facts["tensors"]),
            "inputs": ", ".join(map(plain, facts["inputs"])),
            **({"statistics": ", ".join(map(plain, facts["statistics"]))} if facts["statistics"] else {}),
            "passes": f"{passes['whole_model']} over all inputs, {passes['per_tensor']} per tensor, one to merge",
            "reads": size(facts["bytes_read"]),
            "writes": size(facts["bytes_written"]),
            **({"state": size(facts["state_bytes"])} if facts["state_bytes"] else {}),
            "disk needed": size(facts["disk_needed"]),
            "peak memory": size(facts["peak_memory"]),
            "threads": str(facts["threads"]),
        }
    )
    if facts["vocabulary"]:
        _show_vocabulary(facts["vocabulary"])
    for notice in facts["notices"]:
        print(f"note: {notice}", file=sys.stderr)


def _show_vocabulary(facts: Mapping[str, Any]) -> None:
    """How many tokens and rows, and where the rows of new or forced tokens come from."""
    pairs = {"tokenizer": f"of {plain(facts['donor'])}: {facts['tokens']} tokens in {facts['rows']} rows"}
    if facts["added"] or facts["removed"]:
        pairs["changed"] = f"{facts['added']} tokens added, {facts['removed']} removed"
    print_pairs(pairs)
    if facts["origins"]:
        print()
        print_table((">tokens", "such as", "rows come from"), [_origin(origin) for origin in facts["origins"]])


def _origin(origin: Mapping[str, Any]) -> tuple[str, ...]:
    words = " ".join(map(show, origin["tokens"])) + (" ..." if origin["count"] > len(origin["tokens"]) else "")
    models = ", ".join(f"{plain(model)}: {plain(place)}" for model, place in origin["models"].items())
    return str(origin["count"]), words, models


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    each = [
        f"{name} {' '.join(f'{value:g}' for value in values)}"
        for name, values in row["parameters"].items()
        if isinstance(values, list) and all(isinstance(value, int | float) for value in values)
    ]
    action = f"{row['action']} ({row['why']})" if row["why"] else row["action"]
    return plain(row["tensor"]), row["dtype"], str(row["shape"]), size(row["bytes"]), action, ", ".join(each)

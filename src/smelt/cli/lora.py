"""``smelt lora``: low-rank adapters, made from models and merged with each other."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from .options import common, dry_run_option, json_option, pickle_option, settings
from .output import duration, plain, print_json, print_pairs, print_table, size
from .progress import bar

if TYPE_CHECKING:
    from ..adapters import AdapterArtifact, AdapterPlan


@click.group(short_help="Make and merge adapters.", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Low-rank adapters in PEFT's format."""


@command.command(short_help="An adapter from a fine-tune and its base.")
@click.argument("base")
@click.argument("model")
@click.argument("out")
@click.option("--rank", type=click.IntRange(min=1), default=128, show_default=True, help="Most directions per matrix.")
@click.option(
    "--error", type=float, metavar="X",
    help="As few directions as leave this relative error, such as 0.1; --rank still bounds them.",
)  # fmt: skip
@click.option("--sv-epsilon", type=float, default=0.0, show_default=True, help="Leave out singular values up to this.")
@click.option(
    "--distribute-scale/--no-distribute-scale", default=True,
    help="Both factors carry the root of the singular values; else A carries them whole.",
)  # fmt: skip
@click.option("--embeddings", is_flag=True, help="Decompose embedding and head, too, instead of storing them whole.")
@click.option("--save-module", "save_modules", multiple=True, metavar="NAME", help="Store such modules whole.")
@click.option("-i", "--include", multiple=True, metavar="REGEX", help="Only modules whose names match.")
@click.option("-e", "--exclude", multiple=True, metavar="REGEX", help="No modules whose names match.")
@click.option("--skip-undecomposable", is_flag=True, help="Leave out norms and the like instead of storing them whole.")
@click.option(
    "--dtype", "factor_dtype", type=click.Choice(["float32", "bfloat16", "float16", "float64"]), default="float32",
    show_default=True, help="Of the factors.",
)  # fmt: skip
@click.option(
    "--form", type=click.Choice(["lora", "flora"]), default="lora", show_default=True,
    help="PEFT's, or Tucker products, in which convolutions keep their axes.",
)  # fmt: skip
@click.option("--memory", default="4GiB", metavar="SIZE", show_default=True, help="Bounds how many matrices at once.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: the cores this process may use.")
@dry_run_option
@pickle_option
@json_option
@common
def extract(base: str, model: str, out: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Write the PEFT adapter that leads from BASE to MODEL (a fine-tune of it) as the new folder OUT.

    Prints what each module loses: full fine-tunes are rarely of low rank.
    """
    from ..adapters import extract_lora, plan_extract_lora

    if dry_run:
        _show_plan(plan_extract_lora(base, model, out, **options), as_json)
        return
    result = extract_lora(base, model, out, progress=bar(settings().quiet), **options)
    if as_json:
        print_json(result.as_dict())
        return
    _show(result)
    print(result.path)


def _number(value: str) -> Any:
    """A parameter's value: a number, true or false, a list, or a word, as in a recipe."""
    import yaml

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _parameters(ctx: click.Context, option: click.Parameter, pairs: tuple[str, ...]) -> dict[str, Any]:
    found = dict(pair.partition("=")[::2] for pair in pairs)
    wrong = next((pair for pair in pairs if "=" not in pair), None)
    if wrong is not None:
        raise click.BadParameter(f"{wrong!r} is not NAME=VALUE", ctx, option)
    return {name: _number(value) for name, value in found.items()}


@command.command(short_help="One adapter from several.")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.argument("out")
@click.option("-w", "--weight", "weights", type=float, multiple=True, help="One for each adapter; 1 by default.")
@click.option("--rank", type=click.IntRange(min=1), help="Most directions per module; by default all of the sum.")
@click.option(
    "--error", type=float, metavar="X",
    help="As few directions as leave this relative error, such as 0.1; --rank still bounds them.",
)  # fmt: skip
@click.option(
    "--combination-type", metavar="TYPE",
    help="With PEFT's numbers instead: linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune, or .._svd.",
)  # fmt: skip
@click.option("--density", type=float, help="Share of values that such a type keeps.")
@click.option(
    "--majority-sign-method", type=click.Choice(["total", "frequency"]), help="ties, dare_ties: how signs are elected."
)
@click.option("--method", metavar="NAME", help="By one of smelt's methods instead, in the adapters' shared space.")
@click.option(
    "-p", "--parameter", "parameters", multiple=True, metavar="NAME=VALUE", callback=_parameters, help="Of the method."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of random draws.")
@click.option(
    "--dtype", "factor_dtype", type=click.Choice(["float32", "bfloat16", "float16", "float64"]), default="float32",
    show_default=True, help="Of the factors.",
)  # fmt: skip
@click.option("--memory", default="4GiB", metavar="SIZE", show_default=True, help="Bounds how many modules at once.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: the cores this process may use.")
@dry_run_option
@pickle_option
@json_option
@common
def merge(
    adapters: tuple[str, ...], out: str, weights: tuple[float, ...], dry_run: bool, as_json: bool, **options: Any
) -> None:  # fmt: skip
    """Write one PEFT adapter made of the LoRA ADAPTERs (folders, hub ids or URLs) as the new folder OUT.

    By default their exact weighted sum, whatever their ranks, alphas and modules; no base model is needed.

    \b
        smelt lora merge A B C OUT -w 0.5 -w 0.3 -w 0.2       the sum, at the rank that it has
        smelt lora merge A B C OUT --error 0.05               as few directions as leave 5 %
        smelt lora merge A B OUT --combination-type ties --density 0.5
        smelt lora merge A B C OUT --method tsv
    """
    from ..adapters import merge_lora, plan_merge_lora

    if dry_run:
        _show_plan(plan_merge_lora(adapters, out, weights=weights or None, **options), as_json)
        return
    result = merge_lora(adapters, out, weights=weights or None, progress=bar(settings().quiet), **options)
    if as_json:
        print_json(result.as_dict())
        return
    _show_merge(result)
    print(result.path)


@command.command(short_help="A fine-tune as few elements, or signs, of its difference.")
@click.argument("base")
@click.argument("model")
@click.argument("out")
@click.option(
    "--form", type=click.Choice(["sparse", "sign"]), required=True,
    help="Single elements, or for all elements a sign and for each tensor a scale (BitDelta).",
)  # fmt: skip
@click.option("--density", type=float, help="sparse: the share of elements of each tensor to keep.")
@click.option(
    "--prune", type=click.Choice(["magnitude", "random"]),
    help="sparse: keep the largest (default), or draw them and divide by the density (DARE).",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draws.")
@click.option(
    "--dtype", "value_dtype", type=click.Choice(["float32", "bfloat16", "float16", "float64"]), default="float32",
    show_default=True, help="Of the kept values.",
)  # fmt: skip
@click.option("--memory", default="4GiB", metavar="SIZE", show_default=True, help="Bounds how many tensors at once.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: the cores this process may use.")
@dry_run_option
@pickle_option
@json_option
@common
def pack(base: str, model: str, out: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Write what leads from BASE to MODEL (a fine-tune of it), packed, as the new folder OUT.

    BASE+OUT then reads as a model, in recipes and everywhere else. Prints what each tensor loses.
    """
    from ..adapters import extract_delta, plan_extract_delta

    if dry_run:
        _show_plan(plan_extract_delta(base, model, out, **options), as_json)
        return
    result = extract_delta(base, model, out, progress=bar(settings().quiet), **options)
    if as_json:
        print_json(result.as_dict())
        return
    if not settings().quiet:
        _warn(result)
        rows = [(plain(m.module), m.stored, f"{m.relative_error:.2%}", m.why) for m in result.modules]
        print_table(("tensor", "stored", ">error", "why"), rows)
        print(f"{result.error:.2%} of the difference's norm is left out", file=sys.stderr)
    print(result.path)


def _show_plan(plan: AdapterPlan, as_json: bool) -> None:
    if as_json:
        print_json(plan.as_dict())
        return
    rows = [(plain(m.module), m.stored, str(m.rank or ""), size(m.nbytes), m.why) for m in plan.modules]
    print_table(("module", "stored", ">most rank", ">most size", "why"), rows)
    print_pairs(
        {
            "inputs": ", ".join(map(plain, plan.inputs)),
            "modules": str(len(plan.modules)),
            "reads": size(plan.bytes_read),
            "writes": f"at most {size(plan.bytes_written)}",
            "disk needed": size(plan.disk_needed),
            "peak memory": size(plan.peak_memory),
            "at once": str(plan.threads),
        }
    )
    for notice in plan.notices:
        print(f"note: {notice}", file=sys.stderr)


def _show_merge(result: AdapterArtifact) -> None:
    if settings().quiet:
        return
    _warn(result)
    rows = [(plain(m.module), m.stored, str(m.rank or ""), f"{m.relative_error:.2%}", m.why) for m in result.modules]
    print_table(("module", "stored", ">rank", ">error", "why"), rows)
    print(f"{result.error:.2%} of the sum's norm is left out, in {duration(result.seconds)}", file=sys.stderr)


def _warn(result: AdapterArtifact) -> None:
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _show(result: AdapterArtifact) -> None:
    if settings().quiet:
        return
    _warn(result)
    columns = ("module", "stored", ">rank", ">above rounding", ">error", "why")
    rows = [
        (plain(m.module), m.stored, str(m.rank or ""), _count(m.above_rounding), f"{m.relative_error:.2%}", m.why)
        for m in result.modules
        if m.norm
    ]
    print_table(columns, rows)
    print(f"{result.error:.2%} of the difference's norm is left out", file=sys.stderr)


def _count(number: int | None) -> str:
    return "" if number is None else str(number)

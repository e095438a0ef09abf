"""``smelt lora``: low-rank adapters."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from .options import common, json_option, settings
from .output import plain, print_json, print_table
from .progress import bar

if TYPE_CHECKING:
    from ..adapters import AdapterArtifact


@click.group(short_help="Make adapters from models.", context_settings={"help_option_names": ["-h", "--help"]})
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
@click.option("--memory", default="4GiB", metavar="SIZE", show_default=True, help="Bounds how many matrices at once.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: the cores this process may use.")
@json_option
@common
def extract(base: str, model: str, out: str, as_json: bool, **options: Any) -> None:
    """Write the PEFT adapter that leads from BASE to MODEL (a fine-tune of it) as the new folder OUT.

    Prints what each module loses: full fine-tunes are rarely of low rank.
    """
    from ..adapters import extract_lora

    result = extract_lora(base, model, out, progress=bar(settings().quiet), **options)
    if as_json:
        print_json(result.as_dict())
        return
    _show(result)
    print(result.path)


def _show(result: AdapterArtifact) -> None:
    if settings().quiet:
        return
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
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

"""``smelt reproduce``: run the recipe of an output again and compare the bits."""

from __future__ import annotations

import sys

import click

from .options import common, json_option, settings
from .output import print_json
from .progress import bar


@click.command(short_help="Does the recipe of an output give the same bits again?")
@click.argument("folder", metavar="OUT")
@click.option("--models", metavar="DIR", help="The folder in which the models lie that the manifest names.")
@click.option("-m", "--model", "named", multiple=True, metavar="NAME=PATH", help="Where one of them is.")
@click.option("--memory", default="1GiB", metavar="SIZE", show_default=True, help="Budget for buffers.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: the cores this process may use.")
@json_option
@common
@click.pass_context
def command(
    ctx: click.Context, folder: str, models: str | None, named: tuple[str, ...], memory: str, threads: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Merge again what OUT was merged from, beside it, compare every tensor and file, and remove it again.

    The manifest names local models without their folders: --models or --model say where they are. Exit code 1 when
    something differs.
    """
    from ..engine import reproduce

    if any("=" not in word for word in named) or (models and named):
        raise click.UsageError("give --models DIR, or --model NAME=PATH for each model")
    places = models or {name: path for name, _, path in (word.partition("=") for word in named)}
    result = reproduce(folder, places, threads=threads, memory=memory, progress=bar(settings().quiet))
    if as_json:
        print_json(result.as_dict())
    elif result.ok:
        print(f"{folder}: the same bits, {result.tensors} tensors")
    for problem in result.problems:
        print(f"error: {problem}", file=sys.stderr)
    for notice in result.notices:
        print(f"note: {notice}", file=sys.stderr)
    ctx.exit(0 if result.ok else 1)

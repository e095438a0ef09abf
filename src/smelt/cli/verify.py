"""``smelt verify``: read an output again and compare it with its manifest."""

from __future__ import annotations

import sys

import click

from .options import common, json_option, settings
from .output import print_json
from .progress import bar


@click.command(short_help="Does an output still hold what its manifest says?")
@click.argument("folder", metavar="OUT")
@json_option
@common
@click.pass_context
def command(ctx: click.Context, folder: str, as_json: bool) -> None:
    """Compare every tensor and file of OUT with smelt-manifest.json. Exit code 1 when something differs."""
    from ..engine import verify

    result = verify(folder, progress=bar(settings().quiet))
    if as_json:
        print_json(result.as_dict())
    elif result.ok:
        print(f"{folder}: as written")
    for problem in result.problems:
        print(f"error: {problem}", file=sys.stderr)
    ctx.exit(0 if result.ok else 1)

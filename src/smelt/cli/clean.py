"""``smelt clean``: what runs that were killed have left behind."""

from __future__ import annotations

import time

import click

from .options import common, json_option
from .output import duration, plain, print_json, print_table, size


@click.command(short_help="What have runs that were killed left behind?")
@click.argument("places", nargs=-1, metavar="[PLACE]...")
@click.option("--remove", is_flag=True, help="Remove what is listed; PLACE is required then.")
@json_option
@common
def command(places: tuple[str, ...], remove: bool, as_json: bool) -> None:
    """List the work folders (OUT.smelt-work) of runs that did not end.

    PLACE is a folder to look in (default: this one), or the OUT of such a run. The next run of the same recipe,
    options and files continues from them; nothing but --remove takes them away.
    """
    from ..engine import leftovers, remove_leftovers

    if remove and not places:
        raise click.UsageError("PLACE is missing: --remove removes what is named")
    found = remove_leftovers(places) if remove else leftovers(places or (".",))
    if as_json:
        print_json([leftover.as_dict() for leftover in found])
        return
    rows = [
        (
            plain(leftover.path), size(leftover.nbytes), str(leftover.tensors),
            duration(max(0.0, time.time() - leftover.modified)),
            "running" if leftover.running else "removed" if remove else "left behind",
        )
        for leftover in found
    ]  # fmt: skip
    if rows:
        print_table(("folder", ">size", ">tensors finished", ">last change ago", "state"), rows)
    else:
        print("nothing is left behind")

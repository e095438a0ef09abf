"""``smelt stack``: recipes that stack layers."""

from __future__ import annotations

from typing import Any

import click

from .options import common, pickle_option


@click.command(short_help="A recipe that stacks, repeats, drops or shuffles layers.")
@click.argument("pattern", type=click.Choice(["blocks", "interleave", "repeat", "shuffle"]), metavar="PATTERN")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--size", type=click.IntRange(min=1), help="interleave: layers in a block.")
@click.option("--step", type=click.IntRange(min=1), help="interleave: from block to block; default: the size.")
@click.option("--every", type=click.IntRange(min=1), help="repeat: copy the last of so many layers; default 1.")
@click.option("--times", type=click.IntRange(min=1), help="repeat: so many copies; default 1.")
@click.option(
    "--scale", type=float,
    help="What copies of layers add is multiplied by this; default 1, in repeat 0: they begin as the identity.",
)  # fmt: skip
@click.option("-w", "--weight", "weights", type=float, multiple=True, help="shuffle: one for each model, in order.")
@click.option("--seed", type=click.IntRange(min=0), help="shuffle: of the draws; default 0.")
@click.option("--full-random", is_flag=True, default=None, help="shuffle: layers from any place, too.")
@click.option("--dtype", help="The recipe's dtype.")
@pickle_option
@common
def command(pattern: str, models: tuple[str, ...], weights: tuple[float, ...], **options: Any) -> None:
    """Print the recipe of a model whose layers are those of MODELs in a PATTERN; `smelt merge -` reads it.

    \b
        smelt stack blocks 'A[0:24]' 'A[8:32]'        depth up-scaling; gaps prune
        smelt stack interleave A B --size 16 --step 8  blocks from A and B in turn
        smelt stack repeat A --every 4                 after 4 layers a copy that begins as the identity
        smelt stack shuffle A B -w 2 -w 1 --seed 7     every layer from A or B
    """
    import yaml

    from ..stacking import stack

    recipe = stack(pattern, models, weights=weights or None, **options)
    print(yaml.safe_dump(recipe, sort_keys=False), end="")

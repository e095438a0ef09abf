"""``smelt tokenizer``: vocabularies."""

from __future__ import annotations

import sys
from typing import Any

import click

from .options import common, json_option, pickle_option, settings
from .output import print_json
from .progress import bar

_METHODS = ("omp", "common_interpolation", "subword", "mean", "zero", "randn", "john_hewitt", "landmark_pca")
_WHERE = click.Choice(["no", "yes", "embed", "lm_head"])


@click.group(short_help="Give models other vocabularies.", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Vocabularies of models."""


@command.command(short_help="Give a model another model's tokenizer.")
@click.argument("model")
@click.argument("donor")
@click.argument("out")
@click.option(
    "--method", type=click.Choice(_METHODS), default="omp", show_default=True, help="How rows are approximated."
)
@click.option("-k", "--k", type=click.IntRange(min=1), help="Tokens per combination (omp, common_interpolation: 64).")
@click.option(
    "--cosine-similarity", is_flag=True, default=None, help="common_interpolation: nearest by cosine, not by distance."
)
@click.option(
    "--weight-scheme", type=click.Choice(["distance_proportional", "barycentric", "least_squares"]),
    help="common_interpolation: weights of the neighbours.",
)  # fmt: skip
@click.option(
    "--subword-method", type=click.Choice(["mean", "sum", "weighted_mean", "first_last"]),
    help="subword: what becomes of the pieces.",
)  # fmt: skip
@click.option(
    "--match", type=click.Choice(["marker", "bytes"]), default="marker", show_default=True,
    help="Which tokens are the same: as written but for the mark of a word's beginning, or of the same bytes.",
)  # fmt: skip
@click.option(
    "--prefix-match", type=_WHERE, default="no", show_default=True,
    help="Else take the row of the longest token that it begins with; in both matrices, or in one.",
)  # fmt: skip
@click.option(
    "--byte-match", type=_WHERE, default="no", show_default=True,
    help="Else take the row of the byte token for a single character, and the reverse.",
)  # fmt: skip
@click.option("--magikarp", is_flag=True, help="Approximate tokens whose rows look untrained, too.")
@click.option("--new-vocab-noise", type=float, default=0.0, show_default=True, help="Deviation of noise on new rows.")
@click.option("--new-vocab-scale", type=float, default=1.0, show_default=True, help="Factor of new rows.")
@click.option(
    "--pad-to-multiple-of", type=click.IntRange(min=1), default=1, show_default=True,
    help="Add rows that no token uses, equal to the mean.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of random rows and noise.")
@click.option("--shard-size", default="5GB", metavar="SIZE", show_default=True, help="Largest weight file.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: the cores this process may use.")
@pickle_option
@json_option
@common
def transplant(model: str, donor: str, out: str, as_json: bool, **options: Any) -> None:
    """Write MODEL with the tokenizer of DONOR as the new folder OUT.

    Rows of shared tokens are copied, the others approximated without training.
    """
    from ..transplant import transplant_tokenizer

    artifact = transplant_tokenizer(model, donor, out, progress=bar(settings().quiet), **options)
    if as_json:
        print_json(artifact.as_dict())
        return
    if not settings().quiet:
        for notice in artifact.warnings:
            print(f"note: {notice}", file=sys.stderr)
    print(artifact.path)

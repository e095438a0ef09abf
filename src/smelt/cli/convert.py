"""``smelt convert``: a checkpoint in another dtype, format or shards, or free of pickles."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import click

from .merge import show_artifact, show_plan
from .options import common, dry_run_option, json_option, pickle_option, settings
from .progress import bar


@click.command(short_help="Write a checkpoint in another form.")
@click.argument("model")
@click.argument("out")
@click.option(
    "--format", type=click.Choice(["safetensors", "gguf"]), default="safetensors", show_default=True,
    help="What the weights are written as.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32", "float64", "q8_0", "fp8_block", "fp8_tensor"]),
    help="Of floating tensors; q8_0 is for gguf, fp8 for the linear layers of safetensors. Default: what each has.",
)  # fmt: skip
@click.option(
    "--scales", type=click.Choice(["fresh", "base"]),
    help="Of fp8: from the values (default), or those that MODEL, which must be FP8 of the same kind, has.",
)  # fmt: skip
@click.option("--shard-size", metavar="SIZE", help="Largest weight file. Default: 5GB.")
@click.option("--memory", default="1GiB", metavar="SIZE", show_default=True, help="Budget for buffers.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: the cores this process may use.")
@click.option(
    "--on-nonfinite", type=click.Choice(["error", "warn", "allow"]), default="error", show_default=True,
    help="NaN or Inf in the model, or from an overflow of --dtype.",
)  # fmt: skip
@dry_run_option
@pickle_option
@json_option
@common
def command(model: str, out: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Write MODEL (a folder, a file, a hub id or a URL) in another form into OUT, a folder that does not exist yet.

    Config, tokenizer and the other files beside the weights come along; a GGUF file holds them itself. Prints the
    path.
    """
    from ..conversion import convert, plan_conversion

    if dry_run:
        with closing(plan_conversion(model, out, **options)) as planned:
            show_plan(planned, as_json)
        return
    show_artifact(convert(model, out, progress=bar(settings().quiet), **options), as_json)

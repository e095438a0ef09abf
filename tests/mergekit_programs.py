"""mergekit's other programs: from their command lines to smelt's front doors. Only names are adapted here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import smelt
from smelt.checkpoint import load_adapter

Arrays = dict[str, Any]


@click.command()
@click.option("--model")
@click.option("--base-model", "base")
@click.option("--out-path", "out")
@click.option("--max-rank", "rank", type=int)
@click.option("--distribute-scale/--no-distribute-scale", default=True)
@click.option("--embed-lora/--no-embed-lora", "embeddings", default=False)
@click.option("--save-module", "save_modules", multiple=True)
@click.option("-e", "--exclude-regex", "exclude", multiple=True)
@click.option("-i", "--include-regex", "include", multiple=True)
@click.option("--sv-epsilon", type=float)
@click.option("--skip-undecomposable", is_flag=True)
@click.option("--quiet", is_flag=True)
def extract_lora(**given: Any) -> None:
    given.pop("quiet")
    smelt.extract_lora(**{name: value for name, value in given.items() if value is not None})


@click.command()
@click.argument("model")
@click.argument("donor")
@click.argument("out")
@click.option("-k", "--k", type=int)
@click.option("-c", "--cosine-similarity/--no-cosine-similarity", default=None)
@click.option("-a", "--approximation-method", "method")
@click.option("-w", "--weight-scheme")
@click.option("-s", "--subword-method")
@click.option("-pm", "--prefix-match")
@click.option("-bm", "--byte-match")
@click.option("--magikarp/--no-magikarp", default=False)
@click.option("-nvn", "--new-vocab-noise", type=float)
@click.option("-nvs", "--new-vocab-scale", type=float)
@click.option("--quiet", is_flag=True)
def tokensurgeon(**given: Any) -> None:
    given.pop("quiet")
    smelt.transplant_tokenizer(**{name: value for name, value in given.items() if value is not None})


#: Program -> its options as smelt's.
PROGRAMS: dict[str, click.Command] = {
    "mergekit-extract-lora": extract_lora, "mergekit-tokensurgeon": tokensurgeon,
}  # fmt: skip


def run(argv: list[str], out: Path) -> Arrays:
    """The tensors that a command line gives; ``OUT`` in it stands for ``out``."""
    program, *arguments = (str(out) if word == "OUT" else word for word in argv)
    PROGRAMS[program].main(arguments, standalone_mode=False)
    with _readers[program](out) as checkpoint:
        return dict(checkpoint)


_readers: dict[str, Callable[[Any], smelt.Checkpoint]] = {
    "mergekit-extract-lora": load_adapter, "mergekit-tokensurgeon": smelt.load,
}  # fmt: skip


def comparable(tensors: Arrays) -> Arrays:
    """Factors are unique up to the signs of directions: they are compared by their products."""
    factors = {name: name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B") for name in tensors}
    return {
        name: tensors[factors[name]] @ array if factors[name] != name else array
        for name, array in tensors.items()
        if "lora_B" not in name and "embedding_B" not in name
    }

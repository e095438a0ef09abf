"""What this version reads and checks, but does not carry out."""

from __future__ import annotations

from collections.abc import Iterator

from .language import OutputSlice, Recipe
from .nodes import Position

_SENTENCE = "{} is understood but not executed by this version"

Finding = tuple[Position, str]


def not_yet(recipe: Recipe) -> list[str]:
    """One line, with its place, for each field whose execution this version refuses."""
    found = [*_sections(recipe), *_of_slices(recipe)]
    for reference in (*recipe.references(), *recipe.statistics(), *recipe.token_references()):
        if reference.override_architecture:
            found.append((reference.position, "override_architecture"))
    found += [(given.position, "an adapter on statistics") for given in recipe.statistics() if given.adapters]
    ordered = sorted(found, key=lambda finding: (finding[0].line, finding[0].column))
    return list(dict.fromkeys(place.report(_SENTENCE.format(what)) for place, what in ordered))


def _sections(recipe: Recipe) -> Iterator[Finding]:
    if recipe.output and recipe.output.format not in ("safetensors", "gguf", "parts"):
        yield recipe.position("output"), f"the output format {recipe.output.format}"


def _of_slices(recipe: Recipe) -> Iterator[Finding]:
    slices: list[OutputSlice] = [piece for _, piece in recipe.output_slices()]
    return ((piece.position, "residual_weight") for piece in slices if piece.residual_weight is not None)

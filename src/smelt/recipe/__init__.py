"""The recipe language: YAML text or a dict to checked, immutable records.

    stages = in_order(parse(text, "recipe.yml"))

Every mistake of a file is raised together, as ``origin:line:column: message``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import UsageError
from .documents import documents, from_plain, to_plain
from .language import (
    AdapterReference,
    InputModel,
    ModelReference,
    OutputModule,
    OutputOptions,
    OutputSlice,
    PlacedSetting,
    Recipe,
    TokenizerOptions,
    TokenRow,
    TokenRule,
)  # fmt: skip
from .nodes import Node, Position, Report
from .reading import EMPTY, read_recipe
from .references import parse_reference
from .resolution import depth_in_slice, levels, resolve_parameter
from .scalars import convert
from .settings import Condition, Setting, Value
from .sizes import parse_size
from .stages import Stage, check_stages, in_order
from .support import not_yet
from .words import did_you_mean

__all__ = [
    "AdapterReference", "Condition", "InputModel", "ModelReference", "OutputModule", "OutputOptions", "OutputSlice",
    "PlacedSetting", "Position", "Recipe", "Setting", "Stage", "TokenRow", "TokenRule", "TokenizerOptions",
    "Value", "as_mapping", "convert", "depth_in_slice", "did_you_mean", "in_order", "levels", "not_yet", "parse",
    "parse_mapping", "parse_reference", "parse_size", "resolve_parameter",
]  # fmt: skip


def parse(text: str, origin: str = "<recipe>") -> list[Recipe]:
    """The recipes of a YAML text (JSON is YAML), one for each document.

    Raises UsageError with one line per mistake; ``origin`` is the file's name in these lines.
    """
    report = Report()
    sources = documents(text, origin, report)
    if not sources:
        report.fail(Position(origin, 1, 1), EMPTY)
    return _read(sources, report)


def parse_mapping(mapping: Mapping[str, Any], origin: str = "<recipe>") -> list[Recipe]:
    """The same for a plain dict, in a list of one. Mistakes are placed by key, not by line.

    Raises UsageError with one line per mistake.
    """
    report = Report()
    node = from_plain(mapping, origin, report)
    return _read([(node, json.dumps(to_plain(node), indent=2))], report)


def as_mapping(text: str, origin: str = "<recipe>") -> dict[str, Any]:
    """The one document of a YAML text as plain data. UsageError where there are others, or no mapping."""
    report = Report()
    found = [to_plain(node) for node, _ in documents(text, origin, report)]
    UsageError.gather(report.problems)
    if len(found) != 1 or not isinstance(found[0], dict):
        raise UsageError(f"{origin}: expected one document with keys, found {len(found)} documents")
    return found[0]


def _read(sources: list[tuple[Node, str]], report: Report) -> list[Recipe]:
    read = [read_recipe(node, text, report) for node, text in sources]
    recipes = [recipe for recipe in read if recipe]
    check_stages(recipes, report)
    UsageError.gather(report.problems)
    return [replace(recipe, notices=report.notices) for recipe in recipes]

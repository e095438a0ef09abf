"""Several documents in one file: each named one is a stage whose result the others may name as a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..errors import show
from .language import Recipe
from .nodes import Report


def check_stages(recipes: Sequence[Recipe], report: Report) -> None:
    """Names are unique, at most one document has none, and no stage needs its own result."""
    first: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe.name and recipe.name in first:
            report.fail(recipe.position("name"), f"two documents are called {show(recipe.name)}")
        first.setdefault(recipe.name or "", recipe)
    unnamed = [recipe for recipe in recipes if recipe.name is None]
    for recipe in unnamed[1:]:
        report.fail(recipe.position("merge_method"), "only one of several documents may go without a name")
    _check_circles(first, report)


def _check_circles(stages: dict[str, Recipe], report: Report) -> None:
    needs = {name: sorted(_stages_named_by(recipe, stages)) for name, recipe in stages.items()}
    done: set[str] = set()
    for name in stages:
        circle = _circle_from(name, needs, done)
        if circle:
            place = stages[circle[0]].position("name")
            if len(circle) == 2:
                report.fail(place, f"the recipe {show(circle[0])} refers to itself")
            else:
                report.fail(place, f"these recipes need each other: {' -> '.join(map(show, circle))}")
            return


def _stages_named_by(recipe: Recipe, stages: dict[str, Recipe]) -> set[str]:
    named = set()
    for reference in (*recipe.references(), *recipe.token_references()):
        if reference.recipe:
            named |= _stages_named_by(reference.recipe, stages)
        elif reference.revision is None and reference.path in stages:
            named.add(reference.path)
    return named


def _circle_from(start: str, needs: dict[str, list[str]], done: set[str]) -> list[str]:
    """The first circle reachable from ``start``, its first stage repeated at the end; empty if none."""
    path: list[str] = []
    pending: list[tuple[str, bool]] = [(start, True)]
    while pending:
        name, entering = pending.pop()
        if not entering:
            done.add(path.pop())
        elif name in path:
            return [*path[path.index(name) :], name]
        elif name not in done:
            path.append(name)
            pending.append((name, False))
            pending += [(needed, True) for needed in needs[name]]
    return []


class Stage(NamedTuple):
    """A recipe whose result others name: ``name`` is the path that they write for it."""

    name: str
    recipe: Recipe


def in_order(recipes: Sequence[Recipe]) -> list[Stage]:
    """The recipes that the output needs, inline ones too, each behind those whose results it takes.

    The output comes last: it is the document without a name, or else the last one. Documents that it does not
    need are left out, with a notice.
    """
    output = next((recipe for recipe in recipes if recipe.name is None), recipes[-1])
    documents = {recipe.name: recipe for recipe in recipes if recipe.name and recipe is not output}
    found: dict[str, Recipe] = {}
    _add_stages(output, documents, found)
    idle = [
        recipe.position("name").report(f"the document {show(name)} is used by no other: it is not run")
        for name, recipe in documents.items()
        if name not in found
    ]
    text = "".join(recipe.text for recipe in recipes)
    whole = replace(output, text=text, notices=(*output.notices, *idle)) if len(recipes) > 1 else output
    return [*(Stage(name, recipe) for name, recipe in found.items()), Stage(output.name or "", whole)]


def _add_stages(recipe: Recipe, documents: Mapping[str, Recipe], found: dict[str, Recipe]) -> None:
    """Add what ``recipe`` takes, deepest first (:func:`check_stages` has ruled out circles)."""
    for reference in (*recipe.references(), *recipe.token_references()):
        needed = reference.recipe or (documents.get(reference.path) if reference.revision is None else None)
        if needed is not None and reference.path not in found:
            _add_stages(needed, documents, found)
            found[reference.path] = needed

"""Several documents in one file: each named one is a stage whose result the others may name as a model."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageError, show
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
    for reference in recipe.references():
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


def single(recipes: Sequence[Recipe]) -> Recipe:
    """The only recipe of a file. UsageError when there are several: this version runs one."""
    if len(recipes) > 1:
        second = recipes[1].position("merge_method")
        raise UsageError(
            second.report(
                f"the file holds {len(recipes)} documents; running several as stages is understood but not "
                "executed by this version: run them one by one"
            )
        )
    return recipes[0]

"""Tensor names as paths: the indices in them, and how two ways of naming one model differ."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

_INDEX = re.compile(r"0|[1-9]\d{0,5}")
_EXPERT = re.compile(r"(?:^|\.)\w*experts?\.(0|[1-9]\d{0,5})(?=\.|$)")


class Indexed(NamedTuple):
    """A name cut at its first index: "model.layers" | 3 | "mlp.up_proj.weight"."""

    container: str
    number: int
    rest: str

    def __str__(self) -> str:
        return ".".join(part for part in (self.container, str(self.number), self.rest) if part)


def first_index(name: str) -> Indexed | None:
    """``name`` cut at its first part that is a whole number, or None when no part is."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if _INDEX.fullmatch(part):
            return Indexed(".".join(parts[:place]), int(part), ".".join(parts[place + 1 :]))
    return None


def expert_in(name: str) -> int | None:
    """The number of the expert that a tensor belongs to, or None."""
    match = _EXPERT.search(name)
    return int(match[1]) if match else None


def aligned(names: Collection[str], reference: Collection[str]) -> dict[str, str] | None:
    """``names`` -> names in ``reference``, where both differ by one leading part only ("transformer.").

    Names that the reference has as well stand for themselves. None when no single prefix, put in front or
    taken away, explains all the others.
    """
    known = set(reference)
    odd = sorted(set(names) - known)
    same = {name: name for name in names if name in known}
    for prefix in _prefixes(odd, known):
        longer = {name: prefix + name for name in odd}
        shorter = {name: name.removeprefix(prefix) for name in odd if name.startswith(prefix)}
        for renamed in (longer, shorter):
            if len(renamed) == len(odd) and known.issuperset(renamed.values()):
                return same | renamed
    return None if odd else same


def _prefixes(odd: list[str], known: Iterable[str]) -> list[str]:
    """What may stand in front of the first odd name, or of its counterpart; shortest first."""
    if not odd:
        return []
    name = odd[0]
    longer = {other.removesuffix(name) for other in known if other.endswith("." + name)}
    shorter = {name.removesuffix(other) for other in known if name.endswith("." + other)}
    return sorted(longer | shorter, key=lambda prefix: (len(prefix), prefix))

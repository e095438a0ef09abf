"""Tensor names as paths: the indices in them, and how two ways of naming one model differ."""

from __future__ import annotations

import re
from collections.abc import Collection
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


def renaming(names: Collection[str], reference: Collection[str]) -> tuple[str, str] | None:
    """The leading parts (theirs, the reference's) by which ``names`` differ from names of ``reference``.

    ("", "transformer.") where the reference has "transformer." in front; ("model.", "model.language_model.")
    where a text model is part of a larger one. Names that the reference has as well stand for themselves, and
    numbers do not count, so that models of different depth are matched too. One leading part may stand for
    another only where names with numbers (layers) bear it out. None when no single pair of leading parts
    explains all names; the shortest where several do.
    """
    known, ours = {_numberless(name) for name in reference}, {_numberless(name) for name in names}
    odd = sorted(ours - known)
    if not odd:
        return "", ""
    pairs = {_heads(odd[0], other) for other in known if other.rpartition(".")[2] == odd[0].rpartition(".")[2]}
    return next((pair for pair in sorted(pairs, key=_length) if _explains(pair, odd, known - ours)), None)


def renamed(name: str, pair: tuple[str, str]) -> str | None:
    """``name`` with the first leading part replaced by the second; None when it does not begin with it."""
    return pair[1] + name.removeprefix(pair[0]) if name.startswith(pair[0]) else None


def aligned(names: Collection[str], reference: Collection[str]) -> dict[str, str] | None:
    """``names`` -> names in ``reference``, where both differ by one leading part only ("transformer.").

    Names that the reference has as well stand for themselves. None when some name has no counterpart there.
    """
    pair, known = renaming(names, reference), set(reference)
    if pair is None:
        return None
    found = {name: name if name in known else renamed(name, pair) for name in names}
    return {name: str(other) for name, other in found.items()} if known.issuperset(found.values()) else None


def _numberless(name: str) -> str:
    return ".".join("#" if _INDEX.fullmatch(part) else part for part in name.split("."))


def _heads(name: str, other: str) -> tuple[str, str]:
    """What stands in front of the parts that both names end in."""
    ours, theirs = name.split("."), other.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return "".join(f"{part}." for part in ours), "".join(f"{part}." for part in theirs)


def _explains(pair: tuple[str, str], odd: list[str], free: set[str]) -> bool:
    """Whether the pair leads all odd names to names that are still free."""
    borne_out = "" in pair or any("#" in name.removeprefix(pair[0]) for name in odd)
    return borne_out and "#" not in "".join(pair) and all(renamed(name, pair) in free for name in odd)


def _length(pair: tuple[str, str]) -> tuple[int, tuple[str, str]]:
    return sum(map(len, pair)), pair

"""The vocabulary of the output: the donor's ids stay, what is added comes behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .reading import Vocabulary

#: How the tokenizers library adds a token of which only the text is known.
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


@dataclass(frozen=True, eq=False)
class Lexicon:
    """The vocabulary of the output, and how it differs from the donor's file.

    Attributes
    ----------
    ids: token -> id.
    added: entries that ``added_tokens`` must gain, ``id`` and ``content`` first.
    removed: tokens of the donor's file that it must lose: they have no row.
    """

    ids: Mapping[str, int]
    added: tuple[Mapping[str, Any], ...] = ()
    removed: frozenset[str] = frozenset()

    @property
    def end(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1

    @property
    def is_changed(self) -> bool:
        return bool(self.added or self.removed)


@dataclass
class _Builder:
    ids: dict[str, int]
    declared: set[str]
    added: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    next_id: int = 0

    def add(self, token: str, entry: Mapping[str, Any]) -> None:
        """``token`` as an added token: with a new id, or with the one that it has."""
        if token not in self.ids:
            self.ids[token], self.next_id = self.next_id, self.next_id + 1
        elif token in self.declared:
            return
        self.declared.add(token)
        self.added[token] = {**_PLAIN, **entry, "id": self.ids[token], "content": token}


def build(
    donor: Vocabulary, others: Sequence[Vocabulary], wanted: Mapping[str, Mapping[str, Any]], rows: int
) -> Lexicon:
    """The donor's vocabulary, behind it the tokens of the ``others``, and then those ``wanted`` (with entries).

    The others' tokens come in two groups, as in mergekit: plain ones, model by model and by id; then added and
    special ones in the same order, of which the first definition counts. All of them become added tokens: rules
    that build a token from its parts are the donor's. A token that is plain in the donor and added in another
    model becomes added under its id. Tokens of the donor beyond its ``rows`` are left out.
    """
    kept = donor.within(rows)
    builder = _Builder(dict(kept.ids), set(kept.added), next_id=kept.end)
    for other in others:
        for _, token in sorted(other.tokens.items()):
            if token not in other.added and token not in builder.ids:
                builder.add(token, {})
    for other in others:
        for token, entry in sorted(other.added.items(), key=lambda item: other.ids[item[0]]):
            builder.add(token, entry)
    for token, entry in wanted.items():
        if token not in builder.ids:
            builder.add(token, entry)
    return Lexicon(builder.ids, tuple(builder.added.values()), frozenset(donor.ids.keys() - builder.ids.keys()))

"""The tokenizer of the output: what a plan knows of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..checkpoint.documents import parse_json
from ..recipe import TokenRule
from ..tokenizer import Lexicon, Vocabulary, files_in, remapped

#: label -> the tokens that the model has rows for
Vocabularies = Mapping[str, Vocabulary]


class Donor(NamedTuple):
    """Whose tokenizer the output has: its files, and ``rows`` of its embedding (None: no weights of it are used)."""

    label: str
    files: Mapping[str, bytes]
    rows: int | None


@dataclass(frozen=True, eq=False)
class Tokens:
    """The output's tokenizer: its ``files`` by name, and what it means for rows.

    Attributes
    ----------
    lexicon: the vocabulary; None where rows stay where they are.
    known: the tokens that each model has rows for, by label; needed for planning only.
    rows: of every aligned tensor.
    mean_blanks: whether rows without a token are always the mean of the others.
    rules: what the recipe says of single tokens.
    new_ids: old id -> new id, for the model that lends its config; None where ids stay.
    strangers: whether models mean different tokens by equal ids of their ordinary vocabularies.
    """

    donor: Donor
    files: Mapping[str, bytes]
    lexicon: Lexicon | None = None
    known: Vocabularies = field(default_factory=dict)
    rows: int = 0
    mean_blanks: bool = False
    rules: Mapping[str, TokenRule] = field(default_factory=dict)
    new_ids: Mapping[int, int] | None = None
    strangers: bool = False
    notices: tuple[str, ...] = ()

    @property
    def memory(self) -> int:
        """Bytes, about, that reading and joining vocabularies takes."""
        return 0 if self.lexicon is None else 8 * len(self.files.get("tokenizer.json", b""))

    def remapped(self, config: Mapping[str, Any], lost: list[str]) -> dict[str, Any]:
        """A config of the model that lends it, with its token ids in the output's vocabulary.

        Where its token is gone, what the donor of the tokenizer states holds; ids that neither knows are ``lost``.
        """
        if self.new_ids is None:
            return dict(config)
        gone: list[str] = []
        found = remapped(config, self.new_ids.get, gone)
        stated = self._stated() if gone else {}
        for key in (key for key, value in found.items() if value is None and config[key] is not None):
            found[key] = stated.get(key)
        lost += [f"{what} has no token in the new vocabulary" for what in gone if stated.get(what.split()[0]) is None]
        return found

    def rowless(self, config: Mapping[str, Any]) -> list[str]:
        """The ids in a finished config that have no row."""
        lost: list[str] = []
        if self.lexicon is not None:
            remapped(config, lambda index: index if index < self.rows else None, lost)
        return [f"{what} has no row: there are {self.rows}" for what in lost]

    def _stated(self) -> dict[str, Any]:
        files = files_in(self.donor.files, ("config.json", "generation_config.json"))
        return {key: value for name, data in files.items() for key, value in parse_json(data, name).items()}

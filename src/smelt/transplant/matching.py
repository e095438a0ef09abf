"""Which of a model's rows stands for which token of the donor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .vocabulary import Key, Vocabulary

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Rules:
    """How tokens are matched: by their ``bytes`` or as they are written; also a single character with the
    byte token of the same number; also a token with the longest that it begins with."""

    by_bytes: bool = False
    single_bytes: bool = False
    prefixes: bool = False


@dataclass(frozen=True)
class Match:
    """Donor ids with the model's rows: of the ``same`` token, and of one that is only ``like`` it; sorted by id."""

    same: Mapping[int, int]
    like: Mapping[int, int]
    duplicates: int = 0


def match(own: Vocabulary, own_rows: int, donor: Vocabulary, rules: Rules) -> Match:
    """Ids at or beyond ``own_rows`` have no row in the model's matrix and match nothing."""
    known: dict[Key, int] = {}
    duplicates = 0
    for token, index in sorted(own.ids.items(), key=lambda item: item[1]):
        for key in own.keys(token, rules.by_bytes) if index < own_rows else ():
            duplicates += key in known
            known[key] = index
    same, like = {}, {}
    for token, index in sorted(donor.ids.items(), key=lambda item: item[1]):
        keys = list(donor.keys(token, rules.by_bytes))
        if (row := _first(known, keys)) is not None:
            same[index] = row
        elif (row := _first(known, _similar(keys[-1], rules))) is not None:
            like[index] = row
    return Match(same, like, duplicates)


def _first(known: Mapping[Key, int], keys: list[Key] | Iterator[Key]) -> int | None:
    return next((known[key] for key in keys if key in known), None)


def _similar(key: Key, rules: Rules) -> Iterator[Key]:
    """Keys of other tokens that may stand in, best first."""
    if rules.single_bytes and isinstance(key, tuple):
        mark, text = key
        if len(text) == 1 and ord(text) < 256:
            yield mark, f"<0x{ord(text):02X}>"
        elif byte := _BYTE.fullmatch(text):
            yield mark, chr(int(byte[1], 16))
    if rules.prefixes:
        whole = key[1] if isinstance(key, tuple) else key
        for end in range(len(whole) - 1, 0, -1):
            yield (key[0], key[1][:end]) if isinstance(key, tuple) else key[:end]

"""Token ids that a config states: bos, eos and pad tokens, tokens to suppress, tokens that stand for images."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_KEYS = re.compile(r"(.*_)?token_(ids?|index)|(begin_)?suppress_tokens|bad_words_ids|force_words_ids")

#: The new id of an old one, or None when its token is no longer there.
Translation = Callable[[int], int | None]


def remapped(config: Mapping[str, Any], translate: Translation, lost: list[str]) -> dict[str, Any]:
    """``config`` with every token id translated, in nested configs too.

    An id without translation becomes None, or leaves its list; what it was is appended to ``lost``.
    """
    return {key: _entry(key, value, translate, lost) for key, value in config.items()}


def _entry(key: str, value: Any, translate: Translation, lost: list[str]) -> Any:
    if isinstance(value, Mapping):
        return remapped(value, translate, lost)
    return _ids(key, value, translate, lost) if _KEYS.fullmatch(key) else value


def _ids(key: str, value: Any, translate: Translation, lost: list[str]) -> Any:
    if isinstance(value, list):
        found = [_ids(key, item, translate, lost) for item in value]
        return [item for item in found if item is not None]
    if type(value) is not int or value < 0:
        return value
    new = translate(value)
    if new is None:
        lost.append(f"{key} {value}")
    return new

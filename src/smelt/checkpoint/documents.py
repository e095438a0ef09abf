"""JSON that nobody vouches for: headers, indices and config.json, read within bounds.

Size, depth and the number of values are bounded before anything is parsed, so that no document costs more
than about a gigabyte or a few seconds. A repeated key is refused: it would silently hide the first one.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from .. import storage
from ..errors import InputRejected, show

MAX_BYTES = 64 << 20
MAX_DEPTH = 64

#: How often a document may hold these marks (those within strings count too): a header of a million
#: tensors keeps below. Every value costs memory, an object or a key most.
_MAX_MARKS = {b",": 10_000_000, b":": 4_400_000, b"[": 2_500_000, b"{": 1_500_000}

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
#: Half of a surrogate pair, or what looks like one: as in "\\\\ud800", which spells a backslash.
_HALF = re.compile(rb"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]", re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, at most 64 MiB. NaN and Infinity are taken: config.json files hold them."""
    return parse_json(storage.read_small(path, MAX_BYTES), storage.shown(path))


def parse_json(
    raw: bytes,
    where: str,
    *,
    parse_int: Callable[[str], Any] | None = None,
    parse_constant: Callable[[str], Any] | None = None,
    halves: bool = False,
) -> dict[str, Any]:
    """The object that ``raw`` spells. ``where`` opens every message; the rest is as for ``json.loads``.

    Raises InputRejected when it is malformed, no object, repeats a key, exceeds the bounds above, or (but with
    ``halves``) holds half a surrogate pair, which is no text that could be written again.
    """
    _bound(raw, where)
    try:
        text = raw.decode("utf-8")
        content = json.loads(text, object_pairs_hook=_unique, parse_int=parse_int, parse_constant=parse_constant)
    except UnicodeDecodeError as error:
        raise InputRejected(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise InputRejected(f"{where} is not valid JSON: {error}") from error
    except ValueError as error:
        raise InputRejected(f"{where}: {error}") from error
    if not isinstance(content, dict):
        raise InputRejected(f"{where} holds {brief(content)}, expected an object")
    if not halves and _HALF.search(raw) and not _is_text(content):
        raise InputRejected(f"{where} holds half a surrogate pair, which is no text")
    return content


def _is_text(content: dict[str, Any]) -> bool:
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def brief(value: Any) -> str:
    """A JSON value as messages show it: escaped, on one line, and short however large it is."""
    return show(value) if isinstance(value, str) else reprlib.repr(value)


def _bound(raw: bytes, where: str) -> None:
    for mark, limit in _MAX_MARKS.items():
        if (found := raw.count(mark)) > limit:
            raise InputRejected(f"{where} holds {found} times {show(mark.decode())}, at most {limit} are accepted")
    if (depth := _depth(raw)) > MAX_DEPTH:
        raise InputRejected(f"{where} is nested {depth} levels deep, at most {MAX_DEPTH} are accepted")


def _depth(raw: bytes) -> int:
    """How deep the brackets outside of strings nest; measured first, since a parser would recurse."""
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return 0
    brackets = _STRING.sub(b"", raw).translate(None, _NOT_BRACKETS)
    return max(accumulate(_STEPS[bracket] for bracket in brackets), default=0)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"the key {show(_repeated(pairs))} is given twice")
    return found


def _repeated(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    return next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]

"""JSON side files, read with limits: config.json, indices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import storage
from ..errors import InputRejected, show

MAX_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. InputRejected when it is too large, malformed, or repeats a key."""
    if path.is_symlink() and not path.exists():
        raise InputRejected(f"{show(path)} is a link to a file that is not there: the download was interrupted")
    raw = storage.read_small(path, MAX_BYTES)
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise InputRejected(f"{show(path)} is nested too deeply") from None
    except ValueError as error:
        raise InputRejected(f"{show(path)} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputRejected(f"{show(path)} must hold a JSON object")
    return content


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of the pairs. ValueError for a repeated key, which would silently hide the first."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {show(repeated)} is given twice")
    return found

"""From what a user calls an adapter to the adapter."""

from __future__ import annotations

from pathlib import Path

from .. import storage
from ..checkpoint.adapter import Adapter, read_adapter
from ..errors import InputRejected, show


def open_adapter(source: str | Path) -> Adapter:
    path = Path(source).expanduser()
    if storage.exists(path):
        return read_adapter(path, str(source))
    raise InputRejected(f"{show(str(source))}: no such folder")

"""Which files, connections and processes a block of code asks for."""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import smelt

_listeners: list[list[tuple[str, Any]]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _listeners and event in ("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        for heard in _listeners:
            heard.append((event, arguments[0]))


sys.addaudithook(_audit)  # it stays for good, but listens only when asked to


@contextlib.contextmanager
def listening() -> Iterator[list[tuple[str, Any]]]:
    """The list grows while the block runs."""
    _listeners.append(heard := [])
    try:
        yield heard
    finally:
        _listeners.remove(heard)


#: Where Python and its packages are read from.
OURS = tuple(map(os.path.realpath, (
    sys.prefix, sys.base_prefix, sysconfig.get_paths()["stdlib"], Path(smelt.__file__).parents[1], os.devnull,
    os.environ["SMELT_CACHE"],
)))  # fmt: skip


def strange(opened: list[tuple[str, Any]], home: Path) -> list[tuple[str, Any]]:
    """What has no business in a merge of models below ``home``."""

    def known(event: str, what: Any) -> bool:
        if event != "open" or isinstance(what, int):
            return event == "open"
        # What is removed is named from its folder on: Python's own rmtree looks at one folder after another.
        # A link below home is what the user has named, as those of the hub's cache are.
        return (
            os.path.dirname(what) == ""
            or os.path.abspath(what).startswith(str(home))
            or os.path.realpath(what).startswith(OURS)
        )

    return [found for found in opened if not known(*found)]

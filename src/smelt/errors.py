"""Every error that smelt raises on purpose, drawn once.

    SmeltError                 anything a caller may want to catch
    |- OperationFailed         exit 1: I/O, disk full, verification mismatch, non-finite result
    |   `- SyncFailed          exit 1: data that was written may be lost
    |- UsageError              exit 2: the recipe or the command is wrong
    |   `- MissingExtra        exit 2: an optional dependency is not installed
    `- InputRejected           exit 3: an input is malformed, incompatible or unsafe

A message is one line: what, where (model, file, tensor), found, expected, what to do. Names that come
out of a file are passed through :func:`show` first, so that no terminal escape survives. URLs lose what may be
secret in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^/\s'\"<>?#]*@)?([^\s'\"<>?#]*)(\?[^\s'\"<>#]*)?")


class SmeltError(Exception):
    """Base of all errors raised on purpose. ``problems`` holds one line per mistake found."""

    exit_code = 1

    def __init__(self, message: str, *more: str) -> None:
        self.problems: tuple[str, ...] = tuple(map(_printable, (message, *more)))
        super().__init__("\n".join(self.problems))

    @classmethod
    def gather(cls, problems: Iterable[str]) -> None:
        """Raise one error holding all of ``problems``; do nothing when there are none."""
        found = tuple(problems)
        if found:
            raise cls(*found)


def _printable(problem: str) -> str:
    """The text on one line, without terminal escapes or secrets: a path or a label may hold anything."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in problem)
    return without_secrets(line)


def without_secrets(text: str) -> str:
    """The text with its URLs cut: no user name, no password, no query."""
    return _URL.sub(r"\1\3", text) if "://" in text else text


class OperationFailed(SmeltError):
    """The operation itself failed: I/O, no space, mismatch on verify, a non-finite value."""

    exit_code = 1


class SyncFailed(OperationFailed):
    """fsync failed: pages that it spoke of may be gone although they read well, so nothing of the file can be kept."""


class UsageError(SmeltError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class MissingExtra(UsageError):
    """An optional dependency is needed and not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional dependency: pip install 'smelt[{extra}]'")


class InputRejected(SmeltError):
    """An input is malformed, incompatible with the others, or unsafe."""

    exit_code = 3


def show(name: object, limit: int = 200) -> str:
    """Quote a name from an untrusted file: escaped, on one line, cut to ``limit`` characters."""
    text = str(name)
    cut = text if len(text) <= limit else text[:limit] + "..."
    return repr(cut)

"""The progress bar: drawn on stderr, on a terminal, for work that lasts over a second."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

_PATIENCE, _INTERVAL = 1.0, 0.1  # seconds


def bar(quiet: bool) -> Bar | None:
    """A bar where somebody could see it, else None."""
    dumb = os.environ.get("TERM") == "dumb" or bool(os.environ.get("CI"))
    return None if quiet or dumb or not sys.stderr.isatty() else Bar()


class Bar:
    """Implements the engine's progress protocol. Drawing happens at most ten times a second."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._drawn: Any = None
        self._label, self._total, self._done = "", 0, 0
        self._started = self._next = 0.0

    def start(self, total_bytes: int, label: str) -> None:
        with self._lock:
            self._label, self._total, self._done = label, total_bytes, 0
            self._started = time.monotonic()
            self._next = self._started + _PATIENCE

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if time.monotonic() >= self._next:
                self._next = time.monotonic() + _INTERVAL
                self._draw()

    def finish(self) -> None:
        with self._lock:
            self._next = float("inf")  # a thread that comes late draws nothing
            if self._drawn is not None:
                self._drawn.stop()
                self._drawn = None

    def _draw(self) -> None:
        if self._drawn is None:
            self._drawn = _rich_progress()
            self._drawn.add_task(self._label, total=self._total, speed="")
            self._drawn.start()
        speed = self._done / (time.monotonic() - self._started) / 1e9
        self._drawn.update(0, completed=self._done, speed=f"{speed:.2f} GB/s")


def _rich_progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
    )

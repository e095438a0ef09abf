"""The entry point: run a command and turn whatever happens into a line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from ..errors import OperationFailed, SmeltError
from .options import Settings

BUG, INTERRUPTED = 70, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``smelt`` with ``arguments`` (default: the process's own) and return the exit code."""
    settings = Settings()
    _fill_streams()
    _use_utf8()
    # numpy's linear algebra starts its threads when it is imported: smelt's own threads are enough, each with one
    # matrix, and a matrix product then never depends on how many there are.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        with _signals():
            code = _run(arguments, settings)
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        # Whoever read the output has seen enough; what a command does to files is done by then.
        _discard_output()
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        return _report(error, settings)


def _run(arguments: Sequence[str] | None, settings: Settings) -> int:
    """Parse and call. Click's own ``main`` would exit 1 when the reader of a pipe goes away."""
    from .group import smelt

    if "_SMELT_COMPLETE" in os.environ:
        smelt.main(prog_name="smelt")  # answers the shell, then exits
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with smelt.make_context("smelt", given, obj=settings) as context:
            smelt.invoke(context)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    return 0


def _report(error: Exception, settings: Settings) -> int:
    """Tell the user on stderr; the exit code."""
    if settings.debug:
        traceback.print_exception(error)
    if isinstance(error, click.ClickException):
        return _report_usage(error)
    expected = _as_expected(error)
    if expected is None:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"error: {line}\nThis is a bug in smelt: please report it with the output of the same command "
              "and --debug.", file=sys.stderr)  # fmt: skip
        return BUG
    for problem in expected.problems:
        print(f"error: {problem}", file=sys.stderr)
    return expected.exit_code


def _report_usage(error: click.ClickException) -> int:
    context = getattr(error, "ctx", None)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        print(error.format_message(), file=sys.stderr)
        return 2
    print(f"error: {error.format_message()}", file=sys.stderr)
    if context is not None:
        print(f"See: {context.command_path} --help", file=sys.stderr)
    return 2


def _as_expected(error: Exception) -> SmeltError | None:
    """The error as one that was foreseen, or None for a bug."""
    if isinstance(error, SmeltError):
        return error
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        return OperationFailed(f"{error.strerror or error}{place}")
    if isinstance(error, MemoryError):
        return OperationFailed("out of memory: lower --memory or --threads")
    return None


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind like SIGINT does, so that staging is removed; a second SIGINT ends at once.

    Under nohup SIGHUP stays without effect.
    """
    handlers = {signal.SIGINT: _on_interrupt, signal.SIGTERM: _on_terminate}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        handlers[signal.SIGHUP] = _on_terminate
    try:
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    except ValueError:  # not in the main thread: a program that calls us keeps its own handlers
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    raise KeyboardInterrupt


def _on_terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _fill_streams() -> None:
    """Closed standard streams lead nowhere: else the next file to be opened would take their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is that of the stream
            setattr(sys, name, os.fdopen(nowhere, "r" if number == 0 else "w"))


def _use_utf8() -> None:
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="backslashreplace", newline="\n")


def _discard_output() -> None:
    """Point stdout nowhere, so that the interpreter's own flush at exit stays silent."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

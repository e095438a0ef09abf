"""Options that several commands have, said once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Settings:
    """What holds for the whole call; the context's ``obj``."""

    debug: bool = False
    quiet: bool = False


def settings() -> Settings:
    """The settings of the command that is running."""
    return click.get_current_context().ensure_object(Settings)


def _remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        setattr(ctx.ensure_object(Settings), str(parameter.name), True)


def common(command: F) -> F:
    """``--debug`` and ``--quiet``, before or after the command's name."""
    kind: dict[str, Any] = {"is_flag": True, "expose_value": False, "callback": _remember}
    command = click.option("-q", "--quiet", help="No progress, no summary.", **kind)(command)
    return click.option("--debug", help="Show the traceback of an error.", **kind)(command)


def pickle_option(command: F) -> F:
    return click.option("--allow-pickle", is_flag=True, help="Read pickled weights, too; nothing in them is run.")(
        command
    )


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")(command)


def dry_run_option(command: F) -> F:
    return click.option("--dry-run", is_flag=True, help="Plan and check everything, read no weights, write nothing.")(
        command
    )

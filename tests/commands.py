"""Commands that must fail, run in this process: the form of a refusal is checked for all of them alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from smelt.cli import main
from tests.readback import nothing_left


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    """The exit code and the problems told: one line each on stderr, nothing on stdout, no traceback."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code != 0
    assert not captured.out
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if not line.startswith("See: ")]
    assert lines
    assert all(line.startswith("error: ") for line in lines)
    return code, [line.removeprefix("error: ") for line in lines]


def refused_merge(
    capsys: pytest.CaptureFixture[str], recipe: Path | str, out: Path, *options: object
) -> tuple[int, list[str]]:
    """The same for ``smelt merge``, which must leave nothing behind."""
    result = refusal(capsys, "merge", recipe, out, *options)
    assert nothing_left(out)
    return result

"""The command line: exit codes, what goes to which stream, and what is not imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from smelt import methods
from smelt.cli import main
from smelt.cli.group import COMMANDS, smelt
from smelt.cli.options import Settings
from smelt.errors import InputRejected, MissingExtra, OperationFailed, UsageError

HEAVY = {"numpy", "numba", "torch", "rich", "yaml", "ml_dtypes", "huggingface_hub", "transformers"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``smelt`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "smelt", *arguments], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """``smelt`` in this process: exit code, stdout, stderr."""
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- starting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = f"import sys, smelt.cli; smelt.cli.main({arguments!r}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert HEAVY.isdisjoint(done.stderr.split())
    assert done.stdout


def test_help_lists_every_command_with_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0
    context = click.Context(smelt)
    for name, line in COMMANDS.items():
        command = smelt.get_command(context, name)
        assert command is not None
        assert command.short_help == line
        assert line in out


def test_every_command_file_is_listed() -> None:
    import smelt.cli as package

    helpers = {"__init__", "group", "options", "output", "progress", "start"}
    files = {path.stem for path in Path(next(iter(package.__path__))).glob("*.py")}
    assert files - helpers == set(COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from smelt import __version__

    assert call(capsys, "--version") == (0, f"smelt {__version__}\n", "")


def test_no_arguments_show_help_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys)
    assert (code, out) == (2, "")
    assert "Commands:" in err


# --- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mrege"], "no command 'mrege'; did you mean 'merge'?"),
        (["zzz"], "no command 'zzz'; there are merge, check"),
        (["merge"], "Missing argument 'RECIPE'"),
        (["methods", "--jsn"], "No such option"),
        (["methods", "tie"], "unknown merge method 'tie'; did you mean 'ties'?"),
        (["merge", "r.yml", "out", "--threads", "0"], "--threads"),
        (["merge", "r.yml", "out", "--on-extra", "keep"], "--on-extra"),
        (["merge", "r.yml"], "OUT is missing"),
    ],
)
def test_usage_errors_exit_2(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let ``smelt methods`` raise what the test wants."""

    def fail_with(error: BaseException) -> None:
        def names() -> list[str]:
            raise error

        monkeypatch.setattr(methods, "names", names)

    return fail_with


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (OperationFailed("disk full"), 1, ["error: disk full"]),
        (UsageError("one", "two"), 2, ["error: one", "error: two"]),
        (MissingExtra("cuda", "torch"), 2, ["error: cuda needs an optional dependency: pip install 'smelt[torch]'"]),
        (InputRejected("bad header"), 3, ["error: bad header"]),
        (PermissionError(13, "Permission denied", "x"), 1, ["error: Permission denied: x"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
    ],
)
def test_errors_are_lines_and_exit_codes(
    capsys: pytest.CaptureFixture[str], failing: Any, error: BaseException, code: int, lines: list[str]
) -> None:
    failing(error)
    assert call(capsys, "methods") == (code, "", "\n".join(lines) + "\n")


def test_a_bug_exits_70_and_asks_for_a_report(capsys: pytest.CaptureFixture[str], failing: Any) -> None:
    failing(ZeroDivisionError("a\nb"))
    code, out, err = call(capsys, "methods")
    assert (code, out) == (70, "")
    assert err.splitlines()[0] == "error: ZeroDivisionError: a b"
    assert "report" in err
    assert "--debug" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["--debug", "methods"], ["methods", "--debug"]])
def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], failing: Any, arguments: list[str]) -> None:
    failing(InputRejected("bad header"))
    code, _, err = call(capsys, *arguments)
    assert code == 3
    assert err.startswith("Traceback")
    assert err.endswith("error: bad header\n")


def test_sigterm_unwinds_and_exits_143() -> None:
    script = (
        "import os, signal, smelt.methods, smelt.cli\n"
        "def names():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        signal.pause()\n"
        "    finally:\n"
        "        print('cleaned up', flush=True)\n"
        "smelt.methods.names = names\n"
        "raise SystemExit(smelt.cli.main(['methods']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (143, "cleaned up\n", "")


def test_signal_handlers_are_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    call(capsys, "--version")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m smelt methods --json; echo $? >&2"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        ["/bin/sh", "-c", command], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    os.close(write)
    assert done.stderr == "0\n"


# --- methods --------------------------------------------------------------------------------------------


def test_methods_json_is_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "methods", "--json")
    listed = json.loads(out)
    assert (code, err) == (0, "")
    assert [method["name"] for method in listed] == methods.names()
    for method in listed:
        assert method["citation"]["url"].startswith("https://")
        assert method["summary"]
        assert method["advice"]


def test_one_method_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "methods", "ties", "--json")
    described = json.loads(out)
    parameters = {parameter["name"]: parameter for parameter in described["parameters"]}
    assert code == 0
    assert described["base"] == "required"
    assert parameters["density"]["per_model"]
    assert parameters["density"]["default"] == {"paper": 0.2, "mergekit": 1.0}
    assert parameters["variant"]["choices"] == ["paper", "mergekit"]


def test_a_required_parameter_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "methods", "slerp", "--json")
    t = next(parameter for parameter in json.loads(out)["parameters"] if parameter["name"] == "t")
    assert t["required"]
    assert t["default"] == {"paper": None}


def test_every_method_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for name in methods.names():
        code, out, err = call(capsys, "methods", name)
        method = methods.get(name)
        assert (code, err) == (0, "")
        assert out.startswith(f"{name}: {method.title}\n")
        assert all(parameter.name in out for parameter in method.all_parameters)
        assert method.citation.url in out


def test_tables_carry_no_escapes_when_piped() -> None:
    done = run("methods")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert all(line == line.rstrip() for line in done.stdout.splitlines())
    assert "ties" in done.stdout


def test_commands_also_run_through_click_alone() -> None:
    result = CliRunner().invoke(smelt, ["methods", "linear", "--json"], obj=Settings())
    assert result.exit_code == 0
    assert json.loads(result.stdout)["name"] == "linear"

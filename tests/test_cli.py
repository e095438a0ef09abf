"""The command line: exit codes, what goes to which stream, and what is not imported."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from smelt import methods
from smelt.cli import main
from smelt.cli.group import COMMANDS, smelt
from smelt.cli.options import Settings
from smelt.cli.progress import Bar, bar
from smelt.errors import InputRejected, MissingExtra, OperationFailed, UsageError
from tests.small_models import bf16, fine_tuned, llama, save, shapes

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
        (["zzz"], "no command 'zzz'; there are merge, explain"),
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


# --- merge and verify -----------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """task_arithmetic over two small fine-tunes on disk."""
    base = llama(0)
    models = [save(tmp_path / f"m{seed}", bf16(fine_tuned(base, seed))) for seed in (1, 2)]
    return write_recipe(tmp_path, save(tmp_path / "base", bf16(base)), models)


def write_recipe(folder: Path, base: str, models: list[str]) -> Path:
    entries = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    tree = {"merge_method": "task_arithmetic", "base_model": base, "models": entries, "dtype": "bfloat16"}
    path = folder / "recipe.yml"
    path.write_text(json.dumps(tree))
    return path


def test_merge_prints_the_path_and_tells_the_rest_on_stderr(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = call(capsys, "merge", str(recipe), str(out))
    assert (code, stdout) == (0, f"{out}\n")
    assert stderr.startswith(f"{len(shapes())} tensors, ")
    assert "GB/s" in stderr
    assert (out / "README.md").exists()


def test_merge_json_and_quiet(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = call(capsys, "merge", str(recipe), str(out), "--json", "-q", "--no-card")
    facts = json.loads(stdout)
    assert (code, stderr) == (0, "")
    assert (facts["path"], facts["tensors"], facts["warnings"]) == (str(out), len(shapes()), [])
    assert not (out / "README.md").exists()


def test_a_recipe_from_stdin_gives_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    assert run("merge", str(recipe), str(outs[0])).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "smelt", "merge", "-", str(outs[1])],
        input=recipe.read_text(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = ((out / "model.safetensors").read_bytes() for out in outs)
    assert first == second


def test_a_dry_run_writes_nothing(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.iterdir())
    code, stdout, _ = call(capsys, "merge", str(recipe), "--dry-run", "--json")
    facts = json.loads(stdout)
    assert code == 0
    assert facts["method"] == "task_arithmetic"
    assert {row["tensor"] for row in facts["rows"]} == set(shapes())
    assert facts["bytes_written"] == sum(row["bytes"] for row in facts["rows"])
    code, stdout, _ = call(capsys, "merge", str(recipe), str(tmp_path / "out"), "--dry-run")
    assert code == 0
    assert "weight 0.5 0.5" in stdout
    assert sorted(tmp_path.iterdir()) == before


def test_merge_refuses_two_backbones_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tmp_path / "base", bf16(llama(0)))
    recipe = write_recipe(tmp_path, base, [save(tmp_path / "stranger", bf16(llama(1)))])
    out = tmp_path / "out"
    code, stdout, stderr = call(capsys, "merge", str(recipe), str(out))
    assert (code, stdout) == (3, "")
    assert "does not share the backbone" in stderr
    assert not out.exists()
    code, _, stderr = call(capsys, "merge", str(recipe), str(out), "--force")
    assert code == 0
    assert "warning: " in stderr
    assert out.is_dir()


def test_a_missing_recipe_names_its_neighbour(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, stderr = call(capsys, "merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"))
    assert code == 2
    assert "did you mean 'recipe.yml'?" in stderr


def test_verify_finds_a_changed_byte(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    call(capsys, "merge", str(recipe), str(out))
    assert call(capsys, "verify", str(out)) == (0, f"{out}: as written\n", "")
    weights = out / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, stdout, stderr = call(capsys, "verify", str(out), "--json")
    assert code == 1
    assert json.loads(stdout)["ok"] is False
    assert stderr.count("error: ") == 1


def test_verify_of_a_folder_without_manifest_exits_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, stderr = call(capsys, "verify", str(tmp_path))
    assert (code, stdout) == (3, "")
    assert "smelt-manifest.json" in stderr


# --- inspect --------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> str:
    arrays = bf16(llama(0))
    arrays["model.norm.weight"][:3] = [0, float("nan"), -7]
    return save(tmp_path / "model", arrays)


def test_inspect_counts_what_the_files_hold(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, _ = call(capsys, "inspect", model, "--json")
    facts = json.loads(stdout)
    elements = sum(int(np.prod(shape)) for shape in shapes().values())
    assert code == 0
    assert (facts["parameters"], facts["bytes"], facts["tensors"]) == (elements, 2 * elements, len(shapes()))
    assert facts["dtypes"] == {"BF16": {"tensors": len(shapes()), "elements": elements, "bytes": 2 * elements}}
    assert facts["stacks"] == [{"prefix": "model.layers", "layers": 2}]
    assert facts["roles"]["attention.q"]["tensors"] == 2
    assert [file["name"] for file in facts["files"]] == ["model.safetensors"]
    assert "tensor_table" not in facts


def test_inspect_stats_are_those_of_the_values(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, _ = call(capsys, "inspect", model, "--json", "--stats")
    rows = {row["name"]: row for row in json.loads(stdout)["tensor_table"]}
    values = bf16(llama(0))["lm_head.weight"].astype(np.float64)
    assert code == 0
    assert rows["lm_head.weight"]["lowest"] == values.min()
    assert rows["lm_head.weight"]["highest"] == values.max()
    assert rows["lm_head.weight"]["mean_magnitude"] == pytest.approx(np.abs(values).mean(), rel=1e-6)
    assert rows["lm_head.weight"]["nonfinite"] == 0
    odd = rows["model.norm.weight"]
    assert (odd["nonfinite"], odd["zeros"], odd["lowest"]) == (1, 1, -7)


def test_inspect_lists_tensors_in_order_of_depth(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, _ = call(capsys, "inspect", model, "--roles", "--tensors", "--stats")
    listed = [line.split()[0] for line in stdout.splitlines() if line.split()[:1] and line.split()[0] in shapes()]
    assert code == 0
    assert listed[0] == "model.embed_tokens.weight"
    assert listed[-1] == "lm_head.weight"
    assert sorted(listed) == sorted(shapes())


def test_names_out_of_files_cannot_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "\x1b[31mred[bold]"}
    _, stdout, _ = call(capsys, "inspect", save(tmp_path / "model", bf16(llama(0)), config=config))
    assert "\x1b" not in stdout
    assert "red[bold]" in stdout


def test_inspect_of_nothing_exits_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "inspect", str(tmp_path / "none"))[0] == 3


# --- progress -------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_on_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert bar(quiet=False) is not None
    assert bar(quiet=True) is None
    monkeypatch.setenv("TERM", "dumb")
    assert bar(quiet=False) is None
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("CI", "true")
    assert bar(quiet=False) is None
    monkeypatch.delenv("CI")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert bar(quiet=False) is None


def test_short_work_draws_nothing_and_long_work_does(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("smelt.cli.progress.time.monotonic", lambda: now)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    drawn = Bar()
    drawn.start(10**9, "merging")
    now = 0.9
    drawn.advance(10**8)
    assert terminal.getvalue() == ""
    now = 2.0
    drawn.advance(4 * 10**8)
    drawn.finish()
    assert "merging" in terminal.getvalue()
    assert "0.25 GB/s" in terminal.getvalue()
    written = terminal.getvalue()
    now = 9.0
    drawn.advance(1)
    assert terminal.getvalue() == written

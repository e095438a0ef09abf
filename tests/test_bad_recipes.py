"""Recipes and options that cannot be run: refused in one line each, with the right exit code, leaving nothing.

Numbers are those of the list of bad inputs that the project keeps; what concerns the language alone is
tested with the language.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from smelt import storage
from smelt.cli import main
from tests.commands import refusal, refused_merge
from tests.recipes import Family, recipe


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a recipe file: a mapping, or text in which {base}, {a} and {b} stand for models."""

    def write_file(content: dict[str, Any] | str) -> Path:
        path = tmp_path / "recipe.yml"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write_file


TWO = "models:\n- model: {a}\n  parameters: {{weight: %s}}\n- model: {b}\n  parameters: {{weight: %s}}\n"
TIES = "merge_method: ties\nbase_model: {base}\n" + TWO % (1, 1) + "parameters:\n  "
LINEAR = "merge_method: linear\n"
SLICE = "merge_method: passthrough\nslices:\n- sources:\n  - model: {a}\n    layer_range: "
STAGE = "merge_method: linear\nname: %s\nmodels:\n- model: %s\n  parameters: {{weight: 1}}\n"

#: (what it is, recipe, pattern of the message)
RECIPES = [
    ("105 NaN weight", LINEAR + TWO % (".nan", 1), "NaN.*not allowed"),
    ("105 infinite weight", LINEAR + TWO % (1, "-.inf"), "infinite.*not allowed"),
    ("105 too large weight", LINEAR + TWO % (1, "1" + "0" * 400), "too large"),
    ("105 NaN lambda", TIES + "lambda: .nan", "NaN.*not allowed"),
    ("105 text for a number", TIES + "lambda: much", r"recipe.yml:9:11: .*lambda.*much"),
    ("106 density above 1", TIES + "density: 1.5", r"recipe.yml:9:12: density must lie in \[0, 1\], not 1.5"),
    ("106 density below 0", TIES + "density: -0.1", r"density must lie in \[0, 1\]"),
    ("106 density above 1 in a gradient", TIES + "density: [0.1, 1.5]", r"density must lie in \[0, 1\], not 1.5"),
    ("107 weights that cancel", LINEAR + TWO % (1, -1), "sum to zero.*normalize: false"),
    ("108 beyond the last layer", SLICE + "[0, 3]", r"has 2 layers, the range asks for \[0, 3\]"),
    ("108 reversed", SLICE + "[2, 1]", "runs backwards"),
    ("108 negative", SLICE + "[-1, 1]", "negative"),
    ("108 empty", SLICE + "[1, 1]", "no layer would be left"),
    ("109 broken pattern", TIES + "exclude: ['(']", "exclude.*regular expression"),
    ("110 its own result", STAGE % ("me", "me"), "refers to itself"),
    ("110 a circle", STAGE % ("one", "two") + "---\n" + STAGE % ("two", "one"), "need each other"),
    ("114 unknown method", "merge_method: teis\n" + TWO % (1, 1), r"unknown merge method 'teis'; did you mean 'ties'"),
    ("114 unknown parameter", TIES + "densty: 1", r"no parameter 'densty'; did you mean 'density'\?"),
    ("114 parameter in the wrong place", "merge_method: slerp\nbase_model: {base}\nmodels:\n- model: {a}\n"
     "  parameters: {{t: 1}}\n", "t holds for all models: move it to the top level"),
    ("114 parameter without effect", TIES + "threshold: 3", "threshold has no effect with trim"),
    ("114 required parameter", "merge_method: slerp\nbase_model: {base}\nmodels:\n- model: {a}\n", "t is required"),
    ("116 seed that is no integer", "seed: 1.5\n" + LINEAR + TWO % (1, 1), "seed"),
    ("116 seed that is text", "seed: x\n" + LINEAR + TWO % (1, 1), "seed"),
    ("74 no base", "merge_method: ties\n" + TWO % (1, 1), "ties needs a base model: add base_model"),
    ("75 slerp of three", "merge_method: slerp\nbase_model: {base}\n" + TWO % (1, 1) + "parameters: {{t: 1}}\n",
     "has no parameter 'weight'"),
    ("75 passthrough of two", "merge_method: passthrough\nmodels:\n- model: {a}\n- model: {b}\n",
     r"passthrough takes 1 model\(s\)"),
    ("an early stage", STAGE % ("one", "{a}") + "seed: x\n---\n" + STAGE % ("two", "one"), "seed must be an integer"),
    ("not yet: another architecture", LINEAR + "models:\n- model: {{model: {a}, override_architecture: X}}\n"
     "  parameters: {{weight: 1}}\n", "is understood but not executed by this version"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), [row[1:] for row in RECIPES], ids=[row[0] for row in RECIPES])
def test_a_recipe_that_cannot_run(
    text: str, message: str, write: Any, family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(text.format(base=family.base, a=family.models[0], b=family.models[1]))
    code, told = refused_merge(capsys, path, tmp_path / "out")
    assert code == 2
    assert re.search(message, "\n".join(told))
    assert refusal(capsys, "merge", path, "--dry-run") == (code, told), "a dry run says the same"


def test_all_that_is_wrong_is_told_at_once(
    write: Any, family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TIES + "densty: 1\n  lambda: x\n  scope: layer\n"
    path = write(text.format(base=family.base, a=family.models[0], b=family.models[1]))
    code, told = refused_merge(capsys, path, tmp_path / "out")
    assert code == 2
    assert [re.search(r"recipe.yml:(\d+):", line)[1] for line in told] == ["9", "10", "11"]  # type: ignore[index]


OPTIONS = [
    ("115 device", ["--device", "cuda:99"], 2, "--device cuda:99"),
    ("115 no such device", ["--device", "tpu"], 2, "device must be cpu, cuda or cuda:N"),
    ("116 seed", ["--seed", "x"], 2, "'x' is not a valid integer"),
    ("116 negative seed", ["--seed", "-1"], 2, "--seed"),
    ("118 memory", ["--memory", "1MiB"], 2, "memory must be at least 256MiB, not 1MiB"),
    (
        "118 too little memory for so many threads",
        ["--memory", "256MiB", "--threads", "500"],
        2,
        r"memory: \d+MiB are needed with 500 threads \(\d+MiB with one\), 256MiB allowed",
    ),
    ("118 memory that is none", ["--memory", "lots"], 2, "memory: .*lots"),
    ("shards that are none", ["--shard-size", "0"], 2, "shard_size"),
    ("threads", ["--threads", "0"], 2, "--threads"),
]


@pytest.mark.parametrize(("options", "code", "message"), [row[1:] for row in OPTIONS], ids=[row[0] for row in OPTIONS])
def test_options_that_cannot_be_had(
    options: list[str], code: int, message: str, write: Any, family: Family, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found, told = refused_merge(capsys, write(recipe("linear", family.models)), tmp_path / "out", *options)
    assert found == code
    assert re.search(message, "\n".join(told))


def test_a_filter_that_matches_nothing_is_said_and_strictly_refused(
    write: Any, family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = [{"filter": "q_prj", "value": 0.2}, {"value": 0.5}]
    path = write(recipe("linear", family.models, each={"weight": weight}))
    code, told = refused_merge(capsys, path, tmp_path / "out", "--strict")
    assert code == 2
    assert all("filter 'q_prj' matches no tensor" in line for line in told)
    assert main(["merge", str(path), str(tmp_path / "out")]) == 0
    assert "filter 'q_prj' matches no tensor" in capsys.readouterr().err


def test_too_little_disk(
    write: Any, family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda path: 10)
    code, told = refused_merge(capsys, write(recipe("linear", family.models)), tmp_path / "out")
    assert code == 1
    assert "not enough disk" in told[0]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("full", "is not empty"),
        ("missing/out", "does not exist"),
        ("file", "is not a folder"),
        ("in", "inside each other"),
    ],
)
def test_destinations_that_are_none(
    place: str, message: str, write: Any, family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    out = Path(family.models[0]) / "out" if place == "in" else tmp_path / place
    path = write(recipe("linear", family.models))
    before = sorted(tmp_path.rglob("*"))
    code, told = refusal(capsys, "merge", path, out)
    assert code == 2
    assert message in told[0]
    assert sorted(tmp_path.rglob("*")) == before
    assert place != "in" or not out.exists()


def test_a_destination_that_cannot_be_written(
    write: Any, family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system answers; the tests may run as a user who may write anywhere."""

    def denied(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.mkdir", denied)
    code, told = refused_merge(capsys, write(recipe("linear", family.models)), tmp_path / "out")
    assert code == 1
    assert re.search(r"cannot make the folder '.*out.*': Permission denied", told[0])


@pytest.mark.parametrize(("name", "content"), [("none.yml", None), ("bad.yml", b"\xff\xfe\x00"), ("empty.yml", b"")])
def test_files_that_are_no_recipes(
    name: str, content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    code, told = refused_merge(capsys, path, tmp_path / "out")
    assert code == 2
    assert name in told[0]

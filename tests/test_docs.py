"""The manual says what the code does: its examples run, nothing is left out, made pages are current."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import pytest
import yaml
from docs import generate

import smelt
from smelt import methods
from smelt.cli import main
from tests.gguf_files import save_llama
from tests.lora import written
from tests.small_models import TOKENS, bf16, fine_tuned, llama, save

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TARGETS = {"demo", "test", "test-torch", "faults", "fuzz", "lint", "types", "bench", "docs", "clean"}


class Block(NamedTuple):
    """A fenced example."""

    page: Path
    line: int
    language: str
    text: str


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    every = [Block(page, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in found]
    return [block for block in every if block.language in languages]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``models/`` holds what the examples speak of."""
    folder = tmp_path_factory.mktemp("manual")
    (folder / "models").mkdir()
    base = llama(0)
    save(folder / "models" / "base", bf16(base), tokens=TOKENS)
    for seed, name in enumerate(("code", "prose", "roman"), 1):
        save(folder / "models" / name, bf16(fine_tuned(base, seed, 0.005)), tokens=TOKENS)
        written(folder / "models" / f"{name}-lora", seed)
    save_llama(folder / "models" / "roman-Q8_0.gguf", fine_tuned(base, 3, 0.005), quantised=True)
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path) -> Iterator[Path]:
    """A working folder of one's own, with the models in it."""
    (tmp_path / "models").symlink_to(models / "models")
    with contextlib.chdir(tmp_path):
        yield tmp_path


# --- examples run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "docs/continuing.md"])
def test_examples_of_a_page_run(page: str, here: Path) -> None:
    """All of them in one folder, in the order of the page, as a reader would."""
    runners = {"yaml": keep, "python": run_python, "console": run_console}
    for block in blocks(ROOT / page, *runners):
        runners[block.language](block)


def keep(block: Block) -> None:
    """Save an example under the name in its first line."""
    Path(block.text.partition("\n")[0].removeprefix("# ")).write_text(block.text, encoding="utf-8")


def run_python(block: Block) -> None:
    code = "\n" * block.line + block.text  # so that an error names the line of the page
    exec(compile(code, str(block.page), "exec"), {"__name__": "example"})


def run_console(block: Block) -> None:
    for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block.text, re.MULTILINE):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            main(shlex.split(command)[1:])
        assert_alike(expected, output.getvalue(), command)


def assert_alike(expected: str, found: str, command: str) -> None:
    """Line by line, whatever the numbers and the widths of columns; ``...`` stands for any lines."""
    wanted, lines = shape_of(expected), shape_of(found)
    pattern = "".join(r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n" for line in wanted)
    assert re.fullmatch(pattern, "".join(line + "\n" for line in lines)), f"{command} prints\n{found}\nnot\n{expected}"


def shape_of(text: str) -> list[str]:
    """Lines without what differs from model to model: numbers and their units, rulers, runs of spaces."""
    plain = (re.sub(r"-?\d+(\.\d+)?( [kMG]?B\b)?", "0", line) for line in text.splitlines())
    return [line for row in plain if (line := re.sub(r"\s+|─+", " ", row).strip())]


def test_shell_lines_of_the_manual_exist() -> None:
    """Every command line is one of make's targets, or an installation with extras that there are."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for block in (block for page in PAGES for block in blocks(page, "sh")):
        for line in block.text.splitlines():
            words = shlex.split(line, comments=True)
            known = words[0] == "make" and words[1] in TARGETS
            known |= words[:2] == ["pip", "install"] and words[2] == "."
            assert known, f"{block.page.name}:{block.line}: {line}"
    for extra in set(re.findall(r"\.\[(\w+)\]", "".join(page.read_text(encoding="utf-8") for page in PAGES))):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)


RECIPES = [block for page in PAGES for block in blocks(page, "yaml")]


@pytest.mark.parametrize("block", RECIPES, ids=lambda block: f"{block.page.name}:{block.line}")
def test_recipes_of_the_manual_can_be_planned(block: Block, here: Path) -> None:
    Path("recipe.yml").write_text(block.text, encoding="utf-8")
    with contextlib.closing(smelt.plan("recipe.yml", strict=True)) as plan:
        assert plan.outputs


MODELS = "models: [{model: m, parameters: {weight: 1}}]"
REFUSED = {
    "adapters of statistics": "models: [{model: m, statistics: s+a, parameters: {weight: 1}}]",
    "override_architecture": "models: [{model: {model: m, override_architecture: A}, parameters: {weight: 1}}]",
    "residual_weight": "slices: [{sources: [{model: m, layer_range: [0, 1]}], residual_weight: 0.5}]",
    "holes": f"{MODELS}\nparameters: {{weight: {{search: [0.0, 1.0]}}}}",
    "output formats other than safetensors": f"{MODELS}\noutput: {{format: lora}}",
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_the_manual_says_is_refused_is_refused(field: str, tmp_path: Path) -> None:
    """Before any model is looked at: those named here do not exist."""
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: linear\n{REFUSED[field]}\n", encoding="utf-8")
    with pytest.raises(smelt.UsageError, match=r"not (executed by|part of) this version"):
        smelt.plan(recipe)
    told = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").partition("## What this version refuses")[2]
    assert field in " ".join(told.split())


# --- a new method ---------------------------------------------------------------------------------------


@pytest.fixture
def contributed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The method of CONTRIBUTING.md, put where the registry looks; yields its name."""
    (block,) = blocks(ROOT / "CONTRIBUTING.md", "python")
    path = Path(block.text.partition("\n")[0].removeprefix("# "))
    assert path.parent == Path("src/smelt/methods")
    assert not (ROOT / path).exists(), "the example has become a method: choose another"
    (tmp_path / path.name).write_text(block.text, encoding="utf-8")
    package = importlib.import_module("smelt.methods")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    registry = importlib.import_module("smelt.methods.registry")
    registry.catalogue.cache_clear()
    yield path.stem
    registry.catalogue.cache_clear()
    sys.modules.pop(f"smelt.methods.{path.stem}")


def test_the_method_of_contributing_works(contributed: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In memory, in a recipe, on the command line and in the manual, from one file of about 30 lines."""
    (block,) = blocks(ROOT / "CONTRIBUTING.md", "python")
    (docstring,) = (node for node in ast.parse(block.text).body if isinstance(node, ast.Expr))
    assert docstring.end_lineno is not None
    written = [line for line in block.text.splitlines()[docstring.end_lineno :] if line.strip()]
    assert len(written) <= 30
    base, model = ({"w": np.array([x, -x, 0.5], np.float32)} for x in (1.0, 3.0))
    merged = smelt.merge_tensors(contributed, [model], base, parameters={"alpha": 0.25})
    assert merged["w"].tolist() == [1.5, -1.5, 0.5]
    recipe = {"merge_method": contributed, "base_model": "models/base", "models": [{"model": "models/code"}]}
    smelt.merge(recipe, "out")
    assert smelt.verify("out").ok
    with pytest.raises(smelt.UsageError, match=r"alpha must lie in \[0, 1\]"):
        smelt.plan({**recipe, "parameters": {"alpha": 2}})
    assert main(["methods", contributed]) == 0
    assert "0 gives the base, 1 the fine-tune" in capsys.readouterr().out
    assert f"## {contributed}" in generate.pages()["methods.md"]


# --- nothing is left out --------------------------------------------------------------------------------


def manual() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def test_made_pages_are_current() -> None:
    assert generate.stale() == [], "run make docs"


def test_a_changed_page_is_noticed(tmp_path: Path) -> None:
    for name, text in generate.pages().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert generate.stale(tmp_path) == []
    (tmp_path / "methods.md").write_text("no more", encoding="utf-8")
    (tmp_path / "python.md").unlink()
    assert generate.stale(tmp_path) == ["methods.md", "python.md"]


def test_commands_and_options_are_in_the_manual() -> None:
    text = manual()
    for name, command in generate.command_paths():
        assert f"smelt {name}" in text
        assert command.help
        for option in (p for p in command.params if isinstance(p, click.Option)):
            assert option.help, f"smelt {name} {option.opts[0]} has no help"
            assert all(word in text for word in [*option.opts, *option.secondary_opts])


def test_methods_and_parameters_are_in_the_manual() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    sections: dict[str, str] = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(sections) == methods.names()
    for name, section in sections.items():
        method = methods.get(name)
        assert method.citation.url in section
        assert all(f"`{parameter.name}`" in section for parameter in method.all_parameters)
        assert all(parameter.help for parameter in method.all_parameters)


def test_methods_are_in_the_readme_with_what_they_do() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|$", text, re.MULTILINE))
    assert sorted(rows) == methods.names()
    assert all(rows[name].startswith(methods.get(name).summary) for name in rows)


def test_public_names_are_in_the_manual() -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert all(f"smelt.{name}" in text.replace("\\", "") for name in smelt.__all__)


def test_keys_of_a_recipe_are_in_the_manual() -> None:
    from smelt.recipe.reading import KEYS

    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert all(re.search(rf"^\|.*`{key}`.*\|", text, re.MULTILINE) for key in KEYS)


def test_keys_of_the_manifest_are_in_the_manual(here: Path) -> None:
    Path("recipe.yml").write_text(RECIPES[0].text, encoding="utf-8")
    smelt.merge("recipe.yml", "out")
    content = yaml.safe_load(Path("out/smelt-manifest.json").read_text(encoding="utf-8"))
    keys = {*content, *content["versions"], *content["inputs"][0], *next(iter(content["tensors"].values()))}
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in text for key in keys)


def test_environment_variables_are_in_the_manual() -> None:
    """Every name in capitals that the package looks up in the environment."""
    text = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    read = set()
    for path in (ROOT / "src").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if "environ" in source:
            read |= set(re.findall(r'"(_?[A-Z]+_[A-Z_]+|TERM|CI)"', source))
    assert {"SMELT_CACHE", "HF_HUB_OFFLINE", "CI"} <= read
    assert all(f"`{name}`" in text for name in read)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        goal = page.parent / file if file else page
        assert goal.exists(), f"{page.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", goal.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {head.lower().replace(" ", "-") for head in heads}, f"{page.name} links to {target}"


# --- the Makefile ---------------------------------------------------------------------------------------


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "exec make test\n" in script.read_text(encoding="utf-8")
    assert any("make test\n" in block.text for block in blocks(ROOT / "README.md", "sh"))


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_make_targets_set_up_an_environment_once(target: str, tmp_path: Path) -> None:
    """Bare: made and filled first. With the stamps there: straight to work."""
    bare = planned(target, tmp_path / "none")
    ready = tmp_path / "ready"
    ready.mkdir()
    for stamp in (".made", ".dev", ".fuzz", ".torch", ".demo"):
        (ready / stamp).touch()
    if target != "clean":
        assert "-m venv" in bare
        assert "install" in bare
    assert not re.search(r"-m venv|pip install", planned(target, ready))


def planned(target: str, environment: Path) -> str:
    """What make would run."""
    command = ["make", "-n", "-C", str(ROOT), target, f"VENV={environment}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

"""What ``import smelt`` promises: the names, where they come from, and what is not imported for them."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import smelt

#: The promise. A name that is added or removed here is a change for users: tell it in CHANGELOG.md.
PUBLIC = [
    "Artifact", "Checkpoint", "InputRejected", "MissingExtra", "OperationFailed", "Plan", "SmeltError", "Soup",
    "UsageError", "__version__", "check", "choose_lambdas", "continue_merge", "convert", "extract_delta",
    "extract_lora", "greedy_soup", "leftovers", "load", "merge", "merge_lora", "merge_tensors", "methods", "plan",
    "regmean_plus_plus",
    "remove_leftovers", "reproduce", "restore_task", "stack", "transplant_tokenizer", "verify",
]  # fmt: skip
HEAVY = {"numpy", "numba", "llvmlite", "torch", "transformers", "huggingface_hub", "rich", "yaml", "ml_dtypes"}
DOORS = ["smelt", *(f"smelt.{name}" for name in (
    "adapters", "architecture", "checkpoint", "diagnosis", "engine", "methods", "recipe", "statistics",
    "transplant",
))]  # fmt: skip


def imported_by(code: str) -> set[str]:
    """The top-level packages that are loaded once ``code`` has run in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stderr.split())


def test_public_names_are_sorted_and_complete() -> None:
    assert smelt.__all__ == sorted(PUBLIC)


@pytest.mark.parametrize("door", DOORS)
def test_front_doors_list_what_they_have(door: str) -> None:
    """Every name is there, and none twice."""
    package = importlib.import_module(door)
    assert len(package.__all__) == len(set(package.__all__))
    assert all(getattr(package, name) is not None for name in package.__all__)


def test_dir_shows_the_public_names() -> None:
    assert dir(smelt) == sorted(PUBLIC)


def test_type_checkers_see_the_same_names() -> None:
    """The imports under TYPE_CHECKING and the lazy ones say the same."""
    tree = ast.parse(Path(smelt.__file__).read_text(encoding="utf-8"))
    (checking,) = (node for node in tree.body if isinstance(node, ast.If))
    origins = {
        alias.name: node.module for node in checking.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert {name for name, module in origins.items() if module} == set(smelt._HOMES)
    assert {name: origins[name] for name in smelt._HOMES} == smelt._HOMES
    assert [name for name, module in origins.items() if not module] == ["methods"]


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'smelt' has no attribute 'merg'"):
        smelt.merg  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import smelt",
        "import smelt; dir(smelt); smelt.__version__; smelt.SmeltError",
        "import smelt.cli; smelt.cli.main(['--help'])",
        "import smelt.cli; smelt.cli.main(['--version'])",
        "import smelt.cli; smelt.cli.main(['merge', '--help'])",
    ],
)
def test_starting_imports_nothing_heavy(code: str) -> None:
    assert imported_by(code).isdisjoint(HEAVY)


def test_the_engine_needs_no_torch(tmp_path: Path) -> None:
    """A merge from numpy arrays, and one from files to a file, without PyTorch and what belongs to it."""
    from tests.small_models import bf16, fine_tuned, llama, save

    base = llama(0)
    paths = [save(tmp_path / str(seed), bf16(fine_tuned(base, seed))) for seed in (1, 2)]
    recipe = {"merge_method": "linear", "models": [{"model": path, "parameters": {"weight": 1}} for path in paths]}
    code = (
        "import numpy as np, smelt\n"
        "x = {'w': np.ones(3, np.float32)}\n"
        "smelt.merge_tensors('linear', [x, x])\n"
        f"smelt.merge({recipe!r}, {str(tmp_path / 'out')!r})"
    )
    assert imported_by(code).isdisjoint({"torch", "transformers", "safetensors", "huggingface_hub"})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_errors_form_the_tree_that_is_documented() -> None:
    """Exit codes go with the classes."""
    codes = {"OperationFailed": 1, "UsageError": 2, "MissingExtra": 2, "InputRejected": 3}
    for name, code in codes.items():
        error = getattr(smelt, name)
        assert issubclass(error, smelt.SmeltError)
        assert error.exit_code == code
    assert issubclass(smelt.MissingExtra, smelt.UsageError)

"""mergekit's own recipes give what mergekit wrote, or what it should have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import smelt
from tests.mergekit_parity import HERE, OPTIONS, NotYet, cases_in, run_case
from tests.mergekit_programs import PROGRAMS, run

CASES = list(cases_in(HERE))


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_mergekit_case(folder: Path) -> None:
    try:
        run_case(folder, HERE)
    except NotYet as reason:
        pytest.fail(f"a case that was copied because it passes: {reason}")


CONFIGS = [folder for folder in CASES if (folder / "expected_config.json").exists()]

#: A head that is stored under a config that ties it would be ignored by whoever loads the result.
OURS = {"tied-one-explicit-head": {"tie_word_embeddings": False}}


@pytest.mark.parametrize("folder", CONFIGS, ids=lambda folder: folder.name)
def test_the_config_is_mergekits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = json.loads((folder / "case.json").read_text())
    monkeypatch.chdir(HERE / case["cwd"])
    if case["entry"] in PROGRAMS:
        run(case["argv"], tmp_path / "out")
    else:
        options = {key: value for word in case["argv"] for key, value in OPTIONS.get(word, {}).items()}
        smelt.merge(folder / "config.yaml", tmp_path / "out", **options)
    written, wanted = (config(path) for path in (tmp_path / "out" / "config.json", folder / "expected_config.json"))
    assert written == wanted | OURS.get(folder.name, {})


def config(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(path.read_text())
    return {key: value for key, value in read.items() if key != "transformers_version"}


def test_both_kinds_of_expectation_are_covered() -> None:
    kinds = {json.loads((folder / "case.json").read_text())["expected"] for folder in CASES}
    assert kinds == {"output", "error"}

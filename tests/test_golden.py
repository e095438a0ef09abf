"""The cases made by the authors' own code, run through smelt's front door."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance import GOLDEN, RUNNERS, cases_in, run_case

CASES = list(cases_in(GOLDEN))


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_golden_case(folder: Path) -> None:
    assert run_case(folder) == folder.parent.name


def test_every_runner_has_cases() -> None:
    assert {folder.parent.name for folder in CASES} == set(RUNNERS)

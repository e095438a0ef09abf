"""mergekit's own recipes give what mergekit wrote, or what it should have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.mergekit_parity import HERE, NotYet, cases_in, run_case

CASES = list(cases_in(HERE))


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_mergekit_case(folder: Path) -> None:
    try:
        run_case(folder, HERE)
    except NotYet as reason:
        pytest.fail(f"a case that was copied because it passes: {reason}")


def test_both_kinds_of_expectation_are_covered() -> None:
    kinds = {json.loads((folder / "case.json").read_text())["expected"] for folder in CASES}
    assert kinds == {"output", "error"}

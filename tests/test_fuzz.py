"""A short, repeatable part of ``make fuzz``."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz import fuzz

TARGETS = ("header", "index", "manifest", "recipe", "gguf", "pickle", "adapter", "quantised", "state")


def test_mutated_inputs_are_read_right_or_refused(tmp_path: Path) -> None:
    counts, problems = fuzz(250, 0, tmp_path)
    assert problems == []
    assert all(counts[f"{target}: refused"] for target in TARGETS)
    assert counts["header: accepted, as the reference does"], "some are to be good"

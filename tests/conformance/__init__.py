"""Run golden cases: `python -m tests.conformance [DIR ...]`.

A case is a folder with ``case.json``, ``inputs.safetensors`` and ``expected.safetensors``; a DIR is a case,
a folder of cases, or a folder of such folders. Only names are adapted here: every formula lives in smelt.
Exit status 0 only when no case failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import smelt

from .case import Inputs, Mismatch, boundary, compare
from .runners import all_runners

GOLDEN = Path(__file__).parent.parent / "golden"
RUNNERS = all_runners()


def run_case(folder: Path) -> str:
    """Run one case; returns its slug. Raises Mismatch when it fails."""
    inputs = Inputs(folder)
    case = inputs.case
    slug: str = case["method"]
    if slug not in RUNNERS:
        raise Mismatch(f"method {slug!r} is not known")
    try:
        result = RUNNERS[slug](inputs, case["parameters"])
    except smelt.SmeltError as error:
        raise Mismatch(f"refused: {error}") from error
    except Exception as error:
        raise Mismatch(f"crashed: {type(error).__name__}: {error}") from error
    compare(result, dict(smelt.load(folder / "expected.safetensors")), case["tolerance"], boundary(case))
    return slug


def cases_in(folder: Path) -> Iterator[Path]:
    """All case folders at or below ``folder``, sorted."""
    if not folder.is_dir():
        raise SystemExit(f"no such folder: {folder}")
    yield from sorted(path.parent for path in folder.rglob("case.json"))

"""The command: see the package."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from . import GOLDEN, cases_in, run_case
from .case import Mismatch


def main(arguments: list[str]) -> int:
    folders = [Path(argument) for argument in arguments] or [GOLDEN]
    passed: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for folder in (case for top in folders for case in cases_in(top)):
        slug = json.loads((folder / "case.json").read_text())["method"]
        try:
            run_case(folder)
            passed[slug] += 1
        except Mismatch as mismatch:
            failed[slug] += 1
            print(f"FAILED {slug}/{folder.name}: {mismatch}")
    for slug in sorted({*passed, *failed}):
        print(f"{slug:24} {passed[slug]:4} passed {failed[slug]:4} failed")
    print(f"{passed.total()} passed, {failed.total()} failed")
    return 1 if failed.total() or not passed.total() else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""``python -m tests.fuzz [TARGET]... [--runs N] [--seconds S] [--seed N] [--corpus FOLDER] [--by-chance]``.

Each target has a process of its own. The exit code is 1 when a file was found that no error was meant for, that takes
over a second or 512 MiB, or that ends the process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.fuzz.targets import KINDS

#: Names that a mutated file gives to models lead nowhere.
SURROUNDINGS = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}

HEAD = "| target | executions | accepted | refused | edges reached | slowest, ms | memory, MiB | problems |"


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--runs", type=int, default=100_000, help="of each target (default: 100000)")
    parser.add_argument("--seconds", type=float, default=3600, help="for each target at most (default: 3600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="keep here what was reached, and begin with what is here")
    parser.add_argument("--by-chance", action="store_true", help="without atheris")
    return parser.parse_args(words)


def fuzzed(target: str, how: str, chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The report of one process, or what is left of it."""
    kept = chosen.corpus / target if chosen.corpus else None
    if kept and kept.is_dir():
        shutil.copytree(kept, folder / "corpus")
    limits = (str(chosen.runs), str(chosen.seconds), str(chosen.seed))
    command = [sys.executable, "-m", f"tests.fuzz.{how}", target, str(folder), *limits]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **SURROUNDINGS})
    report = folder / "report.json"
    told = json.loads(report.read_text()) if report.exists() else _dead(done, folder)
    edges = re.findall(r"cov: (\d+)", done.stderr)
    if kept and (folder / "corpus").is_dir():
        shutil.copytree(folder / "corpus", kept, dirs_exist_ok=True)
    return {**told, "edges": edges[-1] if edges else ""}


def _dead(done: subprocess.CompletedProcess[str], folder: Path) -> dict[str, Any]:
    """A process that ended before its time: with the file that did it, where the fuzzer has kept it."""
    held = [path.read_bytes() for path in folder.iterdir() if path.name.startswith(("timeout-", "crash-", "oom-"))]
    what = f"the process ended with {done.returncode}: {done.stderr[-2000:]}"
    return {"runs": 0, "counts": {}, "slowest": 0, "peak": 0, "problems": {what: b"".join(held).decode("latin-1")}}


def row(target: str, told: dict[str, Any]) -> str:
    accepted = sum(count for what, count in told["counts"].items() if what != "refused")
    cells = (target, told["runs"], accepted, told["counts"].get("refused", 0), told["edges"],
             round(told["slowest"] * 1000), told["peak"] >> 20, len(told["problems"]))  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def main(words: list[str]) -> int:
    chosen, failed = arguments(words), False
    how = "chance" if chosen.by_chance or importlib.util.find_spec("atheris") is None else "guided"
    if how == "chance":
        print("by chance: " + ("as asked for" if chosen.by_chance else "atheris is not installed"), file=sys.stderr)
    print(HEAD, "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", sep="\n", flush=True)
    for target in chosen.targets or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            told = fuzzed(target, how, chosen, Path(folder))
        print(row(target, told), flush=True)
        for problem, content in told["problems"].items():
            print(f"{target}: {problem}: {content.encode('latin-1')!r}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

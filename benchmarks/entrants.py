"""The programs that are timed: command lines, from the shell's prompt to a folder that is on the disk.

    python -m benchmarks.entrants install mergekit

builds mergekit's own environment, apart from the one that runs smelt.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.shapes import bench_dir

MERGEKIT = "0.1.5"
# mergekit asks for any torch; this one is what its numbers in RESULTS.md were measured with.
TORCH = "2.13.0"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

# smelt and the floor sync what they write; a program that does not must not win by it.
_THEN_SYNC = 'out=$0; "$@" && sync "$out"/* "$out"'


def floor(out: Path, inputs: list[Path], *, overlap: bool = False) -> list[str]:
    program = str(Path(__file__).with_name("floor.py"))
    flags = ["--overlap"] if overlap else []
    return [sys.executable, program, str(out), *map(str, inputs), *flags]


def smelt(recipe: Path, out: Path) -> list[str]:
    return [*smelt_command(), "merge", str(recipe), str(out)]


def smelt_command() -> list[str]:
    """The installed script of this environment, else the package as a module."""
    script = Path(sys.executable).with_name("smelt")
    return [str(script)] if script.exists() else [sys.executable, "-m", "smelt"]


def mergekit(recipe: Path, out: Path) -> list[str]:
    return ["sh", "-c", _THEN_SYNC, str(out), str(mergekit_program()), str(recipe), str(out), "--quiet"]


def mergekit_program() -> Path:
    return bench_dir() / "mergekit" / "bin" / "mergekit-yaml"


def versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    if "smelt" in names:
        answer = subprocess.run([*smelt_command(), "--version"], capture_output=True, text=True, check=True)
        found["smelt"] = answer.stdout.split()[-1]
    if "mergekit" in names:
        found |= {"mergekit": MERGEKIT, "torch (mergekit's)": TORCH}
    return found


def install_mergekit() -> None:
    """Make the environment if it is not there; torch first, so that one known version is used."""
    if mergekit_program().exists():
        return
    folder = bench_dir() / "mergekit"
    venv.create(folder, with_pip=True)
    for requirement in (f"torch=={TORCH}", f"mergekit=={MERGEKIT}"):
        subprocess.run([folder / "bin" / "pip", "install", "--no-input", "--quiet", requirement], check=True)


if __name__ == "__main__":
    if sys.argv[1:] != ["install", "mergekit"]:
        raise SystemExit("usage: python -m benchmarks.entrants install mergekit")
    install_mergekit()

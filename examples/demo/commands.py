"""The public command line of smelt, run as a user would run it, inside the demo's output folder."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def smelt(folder: Path, *arguments: str) -> str:
    """Shows and runs `smelt ARGUMENTS` in `folder`; returns its standard output, lets its messages through.

    Raises subprocess.CalledProcessError when the exit code is not 0.
    """
    print("$ smelt " + shlex.join(arguments), flush=True)
    command = [sys.executable, "-m", "smelt", *arguments]
    # The command runs in another folder, where a relative PYTHONPATH would mean something else.
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    return subprocess.run(command, cwd=folder, env=found, check=True, text=True, stdout=subprocess.PIPE).stdout


def check(folder: Path, models: Sequence[str], base: str) -> dict[str, Any]:
    """The findings, the task vectors' numbers and the advice of `smelt check`."""
    diagnosis: dict[str, Any] = json.loads(smelt(folder, "check", *models, "--base", base, "--json"))
    return diagnosis


def merge(folder: Path, recipe: str, out: str) -> None:
    """Merges, then reads the result again and compares it with its manifest."""
    smelt(folder, "merge", recipe, out)
    smelt(folder, "verify", out)

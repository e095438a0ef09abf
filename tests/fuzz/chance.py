"""``python -m tests.fuzz.chance TARGET FOLDER RUNS SECONDS SEED``: one target, its files mutated by chance alone."""

from __future__ import annotations

import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.mutations import HEADER, mutated, relength
from tests.fuzz.targets import KINDS
from tests.fuzz.trial import Trial


def fuzz(name: str, folder: Path, runs: int, seconds: float, seed: int, hang: int = 0) -> Trial:
    """Mutate and run. ``hang``: a run of so many seconds ends the process."""
    kind, luck, end = KINDS[name], random.Random(f"{name} {seed}"), time.monotonic() + seconds
    trial, seeds = Trial(kind.target, folder), kind.seeds()
    trial.warm(seeds)
    while trial.runs < runs and time.monotonic() < end:
        content = mutated(luck.choice(seeds), luck, kind.form)
        signal.alarm(hang)
        trial.run(relength(content) if kind.form is HEADER and luck.random() < 0.8 else content)
    signal.alarm(0)
    return trial


def main(name: str, folder: str, runs: int, seconds: float, seed: int) -> None:
    trial = fuzz(name, Path(tempfile.mkdtemp(dir=folder)), runs, seconds, seed, hang=60)
    Path(folder, "report.json").write_text(json.dumps(trial.told()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))

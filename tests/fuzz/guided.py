"""``python -m tests.fuzz.guided TARGET FOLDER RUNS SECONDS SEED``: one target through atheris.

Atheris watches the code of smelt (but what Numba compiles) and of the YAML parser. A file by which more of it is
reached is kept in FOLDER/corpus and mutated in turn.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import atheris

from tests.fuzz.mutations import HEADER, mutated, relength

if TYPE_CHECKING:
    from tests.fuzz.targets import Kind
    from tests.fuzz.trial import Trial

#: Small ones are not preferred: they lack what is worth changing. A hang ends the process.
FLAGS = ("-reduce_inputs=0", "-max_len=4096", "-timeout=60", "-rss_limit_mb=0", "-print_final_stats=0")


def main(name: str, folder: str, runs: int, seconds: float, seed: int) -> None:
    kind, trial = watched(name, Path(tempfile.mkdtemp(dir=folder)))
    corpus, end = fill(Path(folder, "corpus"), kind.seeds()), time.monotonic() + seconds

    def run(data: bytes) -> None:
        trial.run(data)
        if trial.runs >= runs or time.monotonic() > end:  # the fuzzer itself would leave no time to tell
            Path(folder, "report.json").write_text(json.dumps(trial.told()))
            os._exit(0)

    def mutate(data: bytes, largest: int, number: int) -> bytes:
        """One third by atheris, the rest by what the format consists of."""
        luck = random.Random(number)
        changed = atheris.Mutate(data, largest) if luck.random() < 0.33 else mutated(data, luck, kind.form)
        return (relength(changed) if kind.form is HEADER and luck.random() < 0.8 else changed)[:largest]

    flags = [*FLAGS, f"-seed={seed + 1}", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], run, custom_mutator=mutate)
    atheris.Fuzz()


def watched(name: str, home: Path) -> tuple[Kind, Trial]:
    """The target, all that it imports changed so that atheris sees what it does."""
    with atheris.instrument_imports(include=["smelt", "yaml"], exclude=["smelt.kernels"], enable_loader_override=False):
        from tests.fuzz.targets import KINDS
        from tests.fuzz.trial import Trial

        kind = KINDS[name]
        trial = Trial(kind.target, home)
        trial.warm(kind.seeds())  # much is imported only when it is needed
    return kind, trial


def fill(corpus: Path, files: list[bytes]) -> Path:
    corpus.mkdir(exist_ok=True)
    for place, content in enumerate(dict.fromkeys(files)):
        (corpus / f"seed-{place}").write_bytes(content)
    return corpus


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))

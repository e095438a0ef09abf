"""``python -m tests.mutants [GROUP]... [--sample N] [--skip N] [--seed N]``: how many mutants the tests kill.

Of each group so many mutants are drawn; the same seed draws the same ones, and ``--skip`` goes on behind those of an
earlier run. Each must make a test of its module fail, or run past a time limit. Those that
``equivalent.txt`` says to mean the same are left out. Ends with 1 where fewer than 90 % of the rest are killed.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.groups import GENERATING, GROUPS, SECONDS
from tests.mutants.operators import Mutant, mutants
from tests.mutants.trials import PACKAGE, ROOT, Trials, load

WANTED = 0.9


def drawn(group: str, seed: int, skip: int, sample: int) -> list[Mutant]:
    """Mutants of all modules of a group, without those that mean the same."""
    found = [
        mutant
        for module in GROUPS[group]
        for mutant in mutants(module, _source(module), generates=module in GENERATING)
    ]
    random.Random(seed).shuffle(found)
    return [mutant for mutant in found[skip : skip + sample] if str(mutant) not in equivalent()]


def equivalent() -> set[str]:
    """As mutants are shown; what stands behind ``#`` says why."""
    lines = (Path(__file__).parent / "equivalent.txt").read_text().splitlines()
    return {line.partition("  #")[0].strip() for line in lines if line and not line.startswith("#")}


def _source(module: str) -> str:
    return (ROOT / PACKAGE / module).read_text()


def survivors(group: str, chosen: Sequence[Mutant]) -> int:
    """How many of the chosen mutants no test notices; each is told."""
    found = 0
    with tempfile.TemporaryDirectory(prefix="smelt-mutants-") as home:
        trials = Trials(Path(home), GROUPS[group])
        for tests in dict.fromkeys(GROUPS[group][mutant.module] for mutant in chosen):
            trials.prepare([f"tests/{name}" for name in tests])
        for mutant in chosen:
            tests = [f"tests/{name}" for name in GROUPS[group][mutant.module]]
            lives = trials.survives(mutant.module, mutant.text(), tests, SECONDS[group])
            print(f"{'SURVIVES' if lives else 'killed  '} {mutant}", flush=True)
            found += lives
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests.mutants", description="How many mutants the tests kill.")
    parser.add_argument("groups", nargs="*", default=list(GROUPS), metavar="GROUP", help=", ".join(GROUPS))
    for name, default in (("sample", 60), ("skip", 0), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # no mutant outlives it
    load()
    tried = killed = 0
    for group in options.groups:
        chosen = drawn(group, options.seed, options.skip, options.sample)
        left = survivors(group, chosen)
        print(f"{group}: {len(chosen) - left} of {len(chosen)} mutants killed", flush=True)
        tried, killed = tried + len(chosen), killed + len(chosen) - left
    return int(killed < WANTED * tried)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

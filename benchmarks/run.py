"""Time smelt against the physical floor and against mergekit, alternating, and write RESULTS.md.

    python -m benchmarks.run --sizes 0.1B,0.5B,1B --methods linear,ties --rounds 3

The checkpoints are made when they are absent. Every run is a whole process, from the shell's prompt to a
folder that is synced to the disk. One round is: floor, smelt, mergekit, each with its inputs warmed (or
dropped), the last output deleted, and all dirty pages written before its clock starts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from time import strftime

from benchmarks import cache, entrants, measure, report
from benchmarks.recipes import MERGES, Timed
from benchmarks.records import Run, Session, command_line, machine, memory_bytes
from benchmarks.shapes import SIZES, bench_dir, weight_files

ENTRANTS = ("floor", "overlap", "smelt", "mergekit")
BRING = {"warm": cache.warm, "cold": cache.drop}


@dataclass(frozen=True, slots=True)
class Course:
    """One merge at one size: its input files, recipe and output, all in the benchmark's own folder."""

    size: str
    merge: Timed

    @property
    def work(self) -> Path:
        return bench_dir() / "work"

    @property
    def out(self) -> Path:
        return self.work / "out"

    @property
    def recipe(self) -> Path:
        return self.work / f"{self.size}-{self.merge.method}.yml"

    def files(self) -> list[Path]:
        return [file for folder in self.merge.inputs(self.size) for file in weight_files(folder)]

    def command(self, entrant: str) -> list[str]:
        if entrant == "smelt":
            return entrants.smelt(self.recipe, self.out)
        if entrant == "mergekit":
            return entrants.mergekit(self.recipe, self.out)
        return entrants.floor(self.out, self.merge.inputs(self.size), overlap=entrant == "overlap")

    def prepare(self, state: str) -> float:
        """Bring disk, memory and page cache into this state; return how much of the inputs is cached."""
        self.work.mkdir(parents=True, exist_ok=True)
        self.recipe.write_text(self.merge.yaml(self.size))
        shutil.rmtree(self.out, ignore_errors=True)
        os.sync()
        files = self.files()
        with cache.memory_at_hand(self.work, SIZES[self.size].nbytes):
            BRING[state](files)
            return cache.cached(files)

    def run(self, entrant: str, state: str) -> tuple[float, measure.Cost]:
        cached = self.prepare(state)
        log = self.work / f"{entrant}.log"
        cost = measure.run(self.command(entrant), log=log, environment=entrants.OFFLINE)
        shutil.rmtree(self.out)
        return cached, cost


def alternate(names: Sequence[str], rounds: int, mergekit_rounds: int) -> Iterator[tuple[int, str]]:
    """Round after round, every entrant once; mergekit sits out the rounds that it is spared."""
    for number in range(rounds):
        for name in names:
            if name != "mergekit" or number < mergekit_rounds:
                yield number, name


def fits(size: str, merge: Timed, state: str) -> bool:
    """Whether the inputs and the output can all be in the page cache, if they have to be."""
    needed = (len(merge.inputs(size)) + 1) * SIZES[size].nbytes
    return state == "cold" or needed < 0.8 * memory_bytes()


def measure_all(options: argparse.Namespace, session: Session, path: Path) -> None:
    for size, state, method in product(options.sizes, options.cache, options.methods):
        course = Course(size, MERGES[method])
        if not fits(size, course.merge, state):
            print(f"{size} {method}: the inputs do not fit in memory, so there is no {state} run", flush=True)
            continue
        able = [name for name in options.entrants if name != "mergekit" or not course.merge.ours]
        for number, name in alternate(able, options.rounds, options.mergekit_rounds):
            measure.wait_until_quiet(options.patience)
            cached, cost = course.run(name, state)
            run = Run(size, method, state, name, number, cached, **asdict(cost))
            session.runs.append(run)
            session.save(path)
            print(line(run), flush=True)


def line(run: Run) -> str:
    what = f"{run.size} {run.cache} {run.method:16} {run.entrant:9}"
    cost = f"{run.wall:8.2f} s {run.cpu:8.2f} CPU s {run.peak / 1e6:7.0f} MB"
    return f"{what} {cost}  (inputs cached {run.cached:.0%}, other load {run.foreign:.2f} cores)"


def compile_kernels(methods: Sequence[str]) -> None:
    """Merge once on the smallest models, untimed: smelt compiles a kernel at its first use and keeps it."""
    for method in methods:
        Course("0.1B", MERGES[method]).run("smelt", "warm")


def generate(sizes: Sequence[str], methods: Sequence[str]) -> None:
    flags = ["--statistics"] if any(MERGES[method].statistics for method in methods) else []
    # In a process of its own, because a large parent would show in the peak memory of its children.
    subprocess.run([sys.executable, "-m", "benchmarks.models", *sizes, *flags], check=True)


def some_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: a comma-separated choice out of ``allowed``, put in the order of ``allowed``."""

    def parse(text: str) -> list[str]:
        wanted = text.split(",")
        if unknown := set(wanted) - set(allowed):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(allowed)}")
        return [name for name in allowed if name in wanted]

    return parse


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=some_of(tuple(SIZES)), default="0.1B,0.5B,1B")
    parser.add_argument("--methods", type=some_of(tuple(MERGES)), default=",".join(MERGES))
    parser.add_argument("--entrants", type=some_of(ENTRANTS), default=",".join(ENTRANTS))
    parser.add_argument("--cache", type=some_of(tuple(BRING)), default="warm", help="warm, cold or both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit-rounds", type=int, default=1, help="of the rounds, those with mergekit")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for a quiet machine before a run")
    return parser


def main() -> None:
    options = arguments().parse_args()
    if "mergekit" in options.entrants:
        entrants.install_mergekit()
    generate(sorted({*options.sizes, "0.1B"}), options.methods)
    if "smelt" in options.entrants:
        compile_kernels(options.methods)
    command = command_line("benchmarks.run", sys.argv[1:])
    session = Session(command, machine(bench_dir()), entrants.versions(options.entrants))
    path = report.sessions_dir() / f"{strftime('%Y%m%d-%H%M%S')}.json"
    measure_all(options, session, path)
    report.write([path])


if __name__ == "__main__":
    main()

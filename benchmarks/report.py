"""Turn the records of one or more sessions into RESULTS.md and its plot.

    python -m benchmarks.report .bench/sessions/*.json

Where two sessions timed the same merge, the later file on the command line counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

from benchmarks.plot import Bars, bar_chart
from benchmarks.records import Rate, Reading, Run, Session
from benchmarks.shapes import SIZES, bench_dir

RESULTS = Path(__file__).with_name("RESULTS.md")
PLOT = Path(__file__).with_name("results.svg")
PROGRAMS = ("smelt", "mergekit")

Key = tuple[str, str, str]


def sessions_dir() -> Path:
    return bench_dir() / "sessions"


class Course:
    """All runs of one merge, at one size, from one state of the cache."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.size, self.method, self.cache = runs[0].size, runs[0].method, runs[0].cache
        self.runs = runs

    def of(self, entrant: str) -> list[Run]:
        return [run for run in self.runs if run.entrant == entrant]

    def wall(self, entrant: str) -> float | None:
        """Median seconds, or None for one that took no part."""
        walls = [run.wall for run in self.of(entrant)]
        return median(walls) if walls else None

    def ratios(self, entrant: str) -> list[float]:
        """Wall time over the floor's of the same round."""
        floors = {run.round: run.wall for run in self.of("floor")}
        return [run.wall / floors[run.round] for run in self.of(entrant) if run.round in floors]

    def bars(self) -> Bars:
        walls = {entrant: self.wall(entrant) for entrant in ("floor", *PROGRAMS)}
        return {entrant: wall for entrant, wall in walls.items() if wall is not None}


def courses(sessions: Iterable[Session]) -> list[Course]:
    """Sorted by state of the cache (warm first), size and order of appearance."""
    found: dict[Key, list[Run]] = {}
    for session in sessions:
        own: dict[Key, list[Run]] = {}
        for run in session.runs:
            own.setdefault((run.cache, run.size, run.method), []).append(run)
        found |= own
    sizes = list(SIZES)
    ordered = sorted(found.items(), key=lambda item: (item[0][0] != "warm", sizes.index(item[0][1])))
    return [Course(runs) for _, runs in ordered]


def markdown(sessions: Sequence[Session]) -> str:
    parts = ["# Results", _INTRODUCTION, _commands(sessions), f"![Wall time of each merge]({PLOT.name})"]
    found = courses(sessions)
    for cache in dict.fromkeys(course.cache for course in found):
        mine = [course for course in found if course.cache == cache]
        parts += [f"## Inputs in a {cache} page cache", merge_table(mine), quietness(mine)]
    if rates := [rate for session in sessions for rate in session.rates]:
        parts += ["## Kernels, one core: bf16 input per CPU second", rate_table(rates)]
    if readings := [reading for session in sessions for reading in session.readings]:
        parts += ["## Weights that are computed as they are read, one core", reading_table(readings)]
    parts += ["## Machine", machine_table(sessions[-1])]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """\
Made by the commands below; `README.md` beside this file says how it is measured. Times are medians in
seconds, with the lowest and highest in brackets; `x floor` is the median over the rounds of wall time over
the floor's wall time in the same round; peaks are resident memory in MB (mapped files included)."""


def _commands(sessions: Sequence[Session]) -> str:
    return "\n".join(["```sh", *(session.command for session in sessions), "```"])


def merge_table(found: Sequence[Course]) -> str:
    head = ["size", "method", "floor s", "overlapped floor s"]
    for program in PROGRAMS:
        head += [f"{program} s", "x floor", "CPU s", "peak MB"]
    rows = [[course.size, course.method, *_merge_cells(course)] for course in found]
    return table([*head, "mergekit / smelt"], rows)


def quietness(found: Sequence[Course]) -> str:
    """How true the label of the cache was, and how much else went on."""
    runs = [run for course in found for run in course.runs]
    held = f"{min(run.cached for run in runs):.0%} to {max(run.cached for run in runs):.0%}"
    others = f"{median(run.foreign for run in runs):.2f} (at most {max(run.foreign for run in runs):.2f})"
    return f"In memory when a run began: {held} of its inputs. Cores that other work kept busy: {others}."


def _merge_cells(course: Course) -> list[str]:
    cells = [spread(_walls(course.of("floor"))), spread(_walls(course.of("overlap")))]
    for program in PROGRAMS:
        runs = course.of(program)
        ratios = course.ratios(program)
        cells += [spread(_walls(runs)), f"{median(ratios):.2f}" if ratios else "-"]
        cells += [
            _middle(runs, lambda run: run.cpu, "{:.1f}"),
            _middle(runs, lambda run: run.peak / 1e6, "{:.0f}"),
        ]
    smelt, mergekit = course.wall("smelt"), course.wall("mergekit")
    return [*cells, f"{mergekit / smelt:.1f}" if smelt and mergekit else "-"]


def _walls(runs: Sequence[Run]) -> list[float]:
    return [run.wall for run in runs]


def _middle(runs: Sequence[Run], value: Callable[[Run], float], form: str) -> str:
    return form.format(median(map(value, runs))) if runs else "-"


def spread(seconds: Sequence[float]) -> str:
    """Median, with lowest and highest when there is more than one: ``1.30 (1.21-1.44)``."""
    if not seconds:
        return "-"
    middle = f"{median(seconds):.2f}"
    return middle if len(seconds) == 1 else f"{middle} ({min(seconds):.2f}-{max(seconds):.2f})"


def rate_table(rates: Sequence[Rate]) -> str:
    rows = [
        [rate.method, str(rate.models), "" if rate.formula is None else f"{rate.formula:.3g}", f"{rate.whole:.3g}"]
        for rate in rates
    ]
    return table(["method", "inputs", "formula GB/s", "with all passes GB/s"], rows)


def reading_table(readings: Sequence[Reading]) -> str:
    return table(["stored as", "read as", "GB/s of output"], [[r.what, r.dtype, f"{r.rate:.2f}"] for r in readings])


def machine_table(session: Session) -> str:
    facts = session.machine | session.versions
    return table(["fact", "value"], [[name, value] for name, value in facts.items()])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(paths: Sequence[Path]) -> None:
    """Write RESULTS.md and, if merges were timed, the plot; warm runs are drawn where there are any."""
    sessions = [Session.load(path) for path in paths]
    RESULTS.write_text(markdown(sessions))
    if found := courses(sessions):
        drawn = [course for course in found if course.cache == found[0].cache]
        groups = [(f"{course.method}, {course.size}", course.bars()) for course in drawn]
        PLOT.write_text(bar_chart(f"Wall time of a merge, {found[0].cache} cache", groups))


if __name__ == "__main__":
    write([Path(name) for name in sys.argv[1:]])

"""``python -m tests.faults [EXPERIMENT]... [--jobs N] [--part P] [--report FILE]``: the whole campaign, or some of it.

Every experiment has a scene, and a process that runs smelt, of its own. Those that wait for the disk, or race, are
played on the disk; the others in memory, where a sync takes no time, if there is a file system for that.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.faults import campaign, room
from tests.faults.campaign import Result, Share
from tests.faults.scene import Scene, scene

#: Where files are in memory, on Linux.
MEMORY = Path("/dev/shm")

BEGIN, END = "<!-- faults: written by python -m tests.faults --report -->\n", "<!-- faults: end -->\n"


@dataclass(frozen=True)
class Task:
    """A part of an experiment that one process plays. ``trials`` is None where there are as many as there are cases."""

    number: str
    experiment: Callable[..., Result]
    trials: int | None
    options: dict[str, Any] = field(default_factory=dict)
    on_disk: bool = False

    def play(self) -> Result | None:
        """None where the experiment cannot be made here."""
        home = None if self.on_disk or not MEMORY.is_dir() else str(MEMORY)
        with tempfile.TemporaryDirectory(dir=home) as folder, _place(self.number, Path(folder)) as place:
            if place is None:
                return None
            began = time.monotonic()
            result = self.experiment(place, trials=self.trials, **self.options)
            result.seconds = time.monotonic() - began
            return result


def tasks(part: float) -> Iterator[Task]:
    """Those that take longest first. ``part``: of the trials that are made by chance; every case is tried anyway."""

    def some(trials: int) -> int:
        return max(1, round(trials * part))

    both: list[dict[str, Any]] = [{"overwrite": False}, {"overwrite": True}]
    for way in both:
        yield from (Task("3", campaign.operations_fail, None, {**way, "share": Share(i, 4)}) for i in range(4))
        yield from (Task("13", campaign.signals_at_places, None, {**way, "share": Share(i, 2)}) for i in range(2))
    yield from (Task("11", room.memory_is_short, None, {"share": Share(i, 4)}) for i in range(4))
    yield Task("11", room.models_are_large, None)
    yield from (Task("8", campaign.power_fails, some(1000), way) for way in both)
    yield from (Task("1", campaign.kills_at_random, some(500), way, on_disk=True) for way in both)
    yield from (Task("2", campaign.kills_at_points, some(20), way) for way in both)
    yield from (Task("13", campaign.signals, some(500), way, on_disk=True) for way in both)
    yield Task("5", campaign.short_transfers, some(1000))
    yield from (Task("12", campaign.rivals, some(100), way, on_disk=True) for way in both)
    yield Task("10", campaign.inputs_change, some(200))
    yield Task("17", campaign.bit_rot, some(1000))
    yield from (Task("7", campaign.syncs_fail, None, way) for way in both)
    yield from (Task("4", campaign.below_python, some(200), way) for way in both)
    yield Task("13", campaign.surroundings, 36)
    yield Task("6", campaign.full_disk, some(20))


@contextlib.contextmanager
def _place(number: str, folder: Path) -> Iterator[Scene | None]:
    library = campaign.shim(folder) if number == "4" else None
    if number == "4" and library is None:
        yield None
        return
    with scene(folder, **({"LD_PRELOAD": str(library)} if library else {})) as place:
        yield place


def played(chosen: Iterable[Task], jobs: int) -> list[Result]:
    """The results, the parts of one experiment put together; each is printed when its last part is done."""
    left: dict[tuple[Any, ...], int] = {}
    found: dict[tuple[Any, ...], Result] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(task.play): _name(task) for task in chosen}
        for name in running.values():
            left[name] = left.get(name, 0) + 1
        for done in as_completed(running):
            name, result = running[done], done.result()
            left[name] -= 1
            if result is not None:
                found[name] = found[name].and_(result) if name in found else result
            if not left[name] and name in found:
                print(row(found[name]), flush=True)
                for problem in found[name].problems[:20]:
                    print(problem, file=sys.stderr)
    return [found[name] for name in sorted(found, key=lambda name: (int(name[0]), *map(str, name)))]


def _name(task: Task) -> tuple[Any, ...]:
    return task.number, task.experiment.__name__, task.options.get("overwrite", False)


HEAD = "| experiment | runs | violations | seconds | how they ended |\n| --- | ---: | ---: | ---: | --- |"


def row(result: Result) -> str:
    ended = ", ".join(f"{count} {what}" for what, count in sorted(result.counts.items()) if count)
    return f"| {result.name} | {result.trials} | {len(result.problems)} | {result.seconds:.0f} | {ended} |"


def report(path: Path, results: list[Result], minutes: float) -> None:
    """Put the table between the two marks of a page."""
    text = path.read_text(encoding="utf-8")
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    trials, bad = sum(result.trials for result in results), sum(len(result.problems) for result in results)
    said = f"{trials} runs in {minutes:.0f} minutes on {os.cpu_count()} cores, {bad} violations.\n"
    table = "\n".join([HEAD, *map(row, results)])
    path.write_text(f"{text[:before]}\n{said}\n{table}\n\n{text[after:]}", encoding="utf-8")


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("experiments", nargs="*", help="numbers; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--part", type=float, default=1.0, help="of the trials that are made by chance (default: all)")
    parser.add_argument("--report", type=Path, help="a page to write the table of the whole campaign into")
    given = parser.parse_args(words)
    if given.report and given.experiments:
        parser.error("--report takes the whole campaign")
    began = time.monotonic()
    print(HEAD, flush=True)
    results = played((t for t in tasks(given.part) if t.number in (given.experiments or [t.number])), given.jobs)
    if given.report:
        report(given.report, results, (time.monotonic() - began) / 60)
    return int(any(result.problems for result in results))

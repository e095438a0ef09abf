"""What a benchmark leaves behind: plain records in JSON, and the facts of the machine they came from."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Run:
    """One timed process. ``cached`` is the fraction of its inputs that was in memory at the start; the
    costs are those of :class:`benchmarks.measure.Cost`."""

    size: str
    method: str
    cache: str
    entrant: str
    round: int
    cached: float
    wall: float
    cpu: float
    peak: int
    peak_anonymous: int
    foreign: float


@dataclass(frozen=True, slots=True)
class Rate:
    """Gigabytes (1e9) of bf16 input per CPU second: by the output's formula alone, and by all passes.

    ``formula`` is None where the output's operands are themselves computed on the way.
    """

    method: str
    models: int
    formula: float | None
    whole: float


@dataclass(frozen=True, slots=True)
class Reading:
    """Gigabytes (1e9) of output per second of one core, where weights are computed as they are read."""

    what: str
    dtype: str
    rate: float


@dataclass(slots=True)
class Session:
    """Everything that one invocation measured."""

    command: str
    machine: dict[str, str]
    versions: dict[str, str]
    runs: list[Run] = field(default_factory=list)
    rates: list[Rate] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Session:
        found = json.loads(path.read_text())
        found["runs"] = [Run(**run) for run in found["runs"]]
        found["rates"] = [Rate(**rate) for rate in found["rates"]]
        found["readings"] = [Reading(**reading) for reading in found.get("readings", [])]
        return cls(**found)


def command_line(module: str, arguments: Sequence[str]) -> str:
    return " ".join(["python -m", module, *arguments])


def machine(folder: Path) -> dict[str, str]:
    """Public facts only: nothing that names the machine or its folders."""
    kernel = re.match(r"[\d.]+\d", platform.release())
    return {
        "CPU": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_bytes() / 2**30:.0f} GiB",
        "file system": _file_system(folder),
        "kernel": f"{platform.system()} {kernel.group() if kernel else '?'}",
        "Python": platform.python_version(),
    }


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_model() -> str:
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "model name"), platform.machine())


def _file_system(folder: Path) -> str:
    """Type of the file system that holds ``folder``: that of the longest mount point above it."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(len(point), kind) for _, point, kind, *_ in mounts if folder.is_relative_to(point)]
    return max(above)[1]

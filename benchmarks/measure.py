"""Run a command as a whole process and say what it cost."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

SAMPLE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Cost:
    """What one process and its children cost; times in seconds, memory in bytes.

    ``peak`` is the largest resident set of any one process, as the kernel counted it: mapped files
    are part of it. ``peak_anonymous`` leaves them out; it is sampled, so it may miss a short peak.
    ``foreign`` is how many cores everything else on the machine kept busy meanwhile (the kernel's own
    writing included): a number near the count of cores says that the time is not to be trusted.
    """

    wall: float
    cpu: float
    peak: int
    peak_anonymous: int
    foreign: float


def run(command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None) -> Cost:
    """Run ``command`` to its end, its output going to ``log``.

    :raises RuntimeError: it failed; the message ends with the last lines of its output.
    """
    with log.open("wb") as output:
        busy, started = busy_seconds(), time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        with AnonymousPeak(process.pid) as anonymous:
            _, status, usage = os.wait4(process.pid, 0)
            wall, busy = time.perf_counter() - started, busy_seconds() - busy
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{command[0]} ended with exit code {process.returncode}:\n{tail}")
    # Linux counts ru_maxrss in KiB. It begins at the resident set of the process that forked, which is
    # why the program that measures must stay small: it imports no numpy.
    cpu = usage.ru_utime + usage.ru_stime
    return Cost(wall, cpu, usage.ru_maxrss * 1024, anonymous.peak, max(0.0, busy - cpu) / wall)


def busy_seconds() -> float:
    """CPU seconds that all cores have spent on anything since the machine started."""
    user, nice, system = Path("/proc/stat").read_text().split(maxsplit=4)[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(patience: float) -> None:
    """Wait until a second in which other work kept less than a fifth of a core busy, or ``patience`` ends."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        busy = busy_seconds()
        time.sleep(1)
        if busy_seconds() - busy < 0.2:
            return


class AnonymousPeak:
    """Sample the anonymous memory of a process and its children while the context lasts."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._pid = pid
        self._done = Event()
        self._thread = Thread(target=self._sample, daemon=True)

    def __enter__(self) -> AnonymousPeak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, sum(map(anonymous_bytes, family(self._pid))))


def family(pid: int) -> list[int]:
    """``pid`` and its descendants, as far as they still run."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(member for child in children for member in family(int(child)))]


def anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = (line.split() for line in status.splitlines() if line.startswith("RssAnon:"))
    return sum(int(line[1]) * 1024 for line in lines)

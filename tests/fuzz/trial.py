"""One mutated file after the other through one target, and what must not become of any of them."""

from __future__ import annotations

import resource
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smelt.errors import SmeltError

#: What a file may take: seconds of computing, and bytes of memory (or what the process had before the first one).
PATIENCE, ROOM = 1.0, 512 << 20

Target = Callable[[bytes, Path], str]


@dataclass
class Trial:
    """``counts``: how often what happened; ``problems``: kind -> the smallest file that shows it."""

    target: Target
    folder: Path
    counts: Counter[str] = field(default_factory=Counter)
    problems: dict[str, bytes] = field(default_factory=dict)
    runs: int = 0
    slowest: float = 0.0
    room: int = 0

    def warm(self, seeds: list[bytes]) -> None:
        """What is compiled is not timed. A file that is good must not become a problem either."""
        for seed in dict.fromkeys(seeds):
            self.outcome(seed)
        self.room = max(ROOM, peak())

    def run(self, content: bytes) -> None:
        began = time.process_time()
        outcome, is_problem = self.outcome(content)
        seconds = time.process_time() - began
        self.runs, self.slowest = self.runs + 1, max(seconds, self.slowest)
        if seconds > PATIENCE:
            outcome, is_problem = f"takes over {PATIENCE:.0f} s", True
        if peak() > self.room:
            outcome, is_problem = f"takes {ROOM >> 20} MiB", True
            self.room = 2 * peak()
        if not is_problem:
            self.counts[outcome] += 1
        elif outcome not in self.problems or len(content) < len(self.problems[outcome]):
            self.problems[outcome] = content

    def outcome(self, content: bytes) -> tuple[str, bool]:
        """What becomes of a file, and whether that must not be."""
        try:
            return self.target(content, self.folder), False
        except SmeltError:
            return "refused", False
        except Exception as error:  # any other is what is looked for
            place = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}", True

    def told(self) -> dict[str, Any]:
        """As JSON, with the smallest file for each problem."""
        found = {kind: self.smallest(kind).decode("latin-1") for kind in self.problems}
        return {"runs": self.runs, "counts": self.counts, "problems": found, "slowest": self.slowest, "peak": peak()}

    def smallest(self, kind: str) -> bytes:
        """A file with this problem from which no piece can be taken."""
        found, length = self.problems[kind], len(self.problems[kind])
        while length := length // 2:
            for start in range(len(found) - length, -1, -1):
                shorter = found[:start] + found[start + length :]
                if self.outcome(shorter) == (kind, True):
                    found = shorter
        return found


def peak() -> int:
    """The largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

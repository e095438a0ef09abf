"""A signal at the n-th place at which Python looks for signals, in the modules that guard what a run leaves."""

from __future__ import annotations

import dis
import signal
import sys
from collections.abc import Callable
from functools import cache
from types import CodeType, FrameType
from typing import Any

#: How the paths of these modules end.
MODULES = ("smelt/engine/publish.py", "smelt/engine/run.py", "smelt/storage.py", "contextlib.py")


@cache
def places(code: CodeType) -> frozenset[int]:
    """Where signals are looked for: when a function begins or goes on, behind calls, and when a loop goes back."""
    found, before = set(), ""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("RESUME", "JUMP_BACKWARD") or before.startswith("CALL"):
            found.add(instruction.offset)
        before = instruction.opname
    return frozenset(found)


class Interrupting:
    """Counts such places while smelt listens to signals, and sends one at the n-th."""

    def __init__(self, nth: int, number: int = signal.SIGTERM) -> None:
        self._nth, self._number = nth, number
        self.seen = 0

    def install(self) -> Interrupting:
        sys.settrace(self._enter)
        return self

    def save(self, path: str) -> None:
        """How many places there were."""
        sys.settrace(None)
        with open(path, "w") as file:
            print(self.seen, file=file)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.endswith(MODULES):
            return None
        frame.f_trace_opcodes = True
        return self._step

    def _step(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "opcode" and frame.f_lasti in places(frame.f_code) and callable(signal.getsignal(self._number)):
            self.seen += 1
            if self.seen == self._nth + 1:
                sys.settrace(None)
                signal.raise_signal(self._number)
        return self._step

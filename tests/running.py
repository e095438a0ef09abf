"""Run a method's coroutine on one operand, as the engine runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from smelt.engine.device import mapper_for
from smelt.engine.execute import Executor
from smelt.engine.jobs import Job, Steps
from smelt.kernels.program import Operand, Output


class _Collected:
    """A sink that keeps float32 values in memory."""

    waiting = 0

    def __init__(self, count: int) -> None:
        self.values = np.full(count, np.nan, np.float32)

    def write(self, name: str, start: int, array: npt.NDArray[Any], release: Callable[[], None]) -> None:
        self.values[start : start + len(array)] = array
        release()

    def finish(self, name: str) -> None:
        pass


def run(method: Callable[[Any], Steps | Output], operand: Operand, threads: int = 2) -> npt.NDArray[np.float32]:
    """The output in float32 and in the operand's shape."""
    sink = _Collected(operand.count)
    with Executor(sink, mapper_for("cpu", "error", print), threads=threads) as executor:
        executor.run([Job("x", "F32", operand.count, [operand], lambda: method(operand))])
    return sink.values.reshape(operand.shape)

"""What is executed, and where it goes: one output tensor, and the sink of all."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from ..kernels.program import Operand, Output, Request

Steps = Generator[tuple[Request, ...], list[Any], Any]


class Sink(Protocol):
    """Where output tensors go. ``waiting``: bytes of arrays that are not released yet."""

    @property
    def waiting(self) -> int: ...

    def write(self, name: str, start: int, array: npt.NDArray[Any], release: Callable[[], None]) -> None:
        """Store elements from ``start`` on; call ``release`` when the array is no longer needed."""

    def finish(self, name: str) -> None:
        """All elements of ``name`` have been written."""


@dataclass(eq=False)
class Job:
    """One output tensor: how it is stored, how to start its method, and what a function of whole matrices holds."""

    name: str
    dtype: str
    count: int
    inputs: Sequence[Operand]
    begin: Callable[[], Steps | Output]
    memory: int = 0

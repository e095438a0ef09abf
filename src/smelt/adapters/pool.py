"""Many modules at once, as far as threads and memory allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from ..engine.options import BASELINE
from ..engine.progress import Progress
from ..errors import UsageError, show
from ..kernels.blas import give_back, one_thread


class Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)
R = TypeVar("R")


def for_each(
    modules: Sequence[T], make: Callable[[T], R], *, needs: Callable[[T], int], nbytes: Callable[[T], int],
    threads: int, memory: int, progress: Progress, label: str,
) -> list[R]:  # fmt: skip
    """``make`` of every module, in order; matrix routines inside run on one thread each.

    ``needs`` is the memory that one takes, ``nbytes`` what it counts for in the progress. UsageError where a single
    module needs more than ``memory``, which is that of the whole process.
    """
    workers = at_once({module.name: needs(module) for module in modules}, threads, memory)
    progress.start(sum(map(nbytes, modules)), label)

    def made(module: T) -> R:
        result = make(module)
        give_back()
        progress.advance(nbytes(module))
        return result

    try:
        with one_thread(), ThreadPoolExecutor(workers, "smelt") as pool:
            return list(pool.map(made, modules))
    finally:
        progress.finish()


def at_once(needs: Mapping[str, int], threads: int, memory: int) -> int:
    """How many modules are worked on at a time. UsageError where one of them alone needs more than ``memory``."""
    largest = max(needs, key=needs.__getitem__)
    most = max(1, needs[largest])
    if most + BASELINE > memory:
        raise UsageError(f"memory must be at least {-(-(most + BASELINE) >> 20)}MiB, for module {show(largest)}")
    return min(threads, (memory - BASELINE) // most)

"""What a merge takes in memory, from headers alone, and how a budget is shared out.

Each thread holds a tile: its operands, its result, and what is computed of some rows. Beside these are the process
itself, vocabularies, what readers and the search for order statistics keep, matrices in work, and results that wait
to be hashed: tensors are hashed in order, by one thread each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..kernels.dtypes import DTYPES
from .options import BASELINE, LEAST_MEMORY
from .outputs import Output, bytes_of
from .reduce import SAMPLED_WHOLE, counters
from .tiles import TILE

if TYPE_CHECKING:
    from .planning import Plan

#: Tiles of results per thread that may wait: so many are planned, and up to so many where there is room.
_AHEAD = 2, 8


class Budget:
    """Figures in bytes, for the plan's threads and its ``memory``."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._threads, self._memory = plan, plan.options.threads, plan.options.memory

    @property
    def peak(self) -> int:
        """Resident memory at most: with little ``memory`` the least that is needed."""
        wanted = sum(self._together) + self._results(_AHEAD[1] - _AHEAD[0])
        return self._beside + max(*self._together[:1], min(wanted, self.matrices), 0)

    @property
    def matrices(self) -> int:
        """What functions of whole matrices may hold together; where one needs more than that, it has to wait."""
        return self._memory - self._beside

    @property
    def ahead(self) -> int:
        """Results that may wait to be hashed."""
        left = max(0, self.matrices - sum(self._together))
        return self._results(_AHEAD[0]) + min(left, self._results(_AHEAD[1] - _AHEAD[0]))

    @cached_property
    def _together(self) -> list[int]:
        """What the functions of whole matrices hold that run at a time, the largest first."""
        return sorted((matrix for _, matrix in self._each.values()), reverse=True)[: self._threads]

    @cached_property
    def _beside(self) -> int:
        """All but matrices."""
        plan, threads = self._plan, self._threads
        vocabulary = 0 if plan.tokens is None else plan.tokens.memory
        packing = 0 if plan.float8 is None else plan.float8.memory(threads)
        tiles = threads * max((tile for tile, _ in self._each.values()), default=0) + self._results(_AHEAD[0])
        return BASELINE + vocabulary + packing + plan.inputs.scratch + tiles + self._counters()

    @cached_property
    def _each(self) -> dict[str, tuple[int, int]]:
        return {output.name: self._of(output) for output in self._plan.made}

    def matrix(self, output: Output) -> int:
        """What the function of a whole tensor holds; 0 where it is made in tiles."""
        return self._each[output.name][1]

    def _of(self, output: Output) -> tuple[int, int]:
        """What one thread needs for a tile of a tensor, and for the tensor as a matrix."""
        method = self._plan.method
        row, more = (1, 0) if output.tensor is None else method.holds(output.tensor)
        count = output.count if output.tensor is None else output.tensor.count
        whole = bool(more) and row >= count
        held = min(count, TILE if whole else TILE + row - 1)
        read = output.weight_bytes + bytes_of((*output.statistics, *output.state))
        tile = int(held / max(1, count) * read) + self._result(output) + (4 << 20)
        return (tile, row * more) if whole else (tile + held * more, 0)

    def _result(self, output: Output) -> int:
        """A tile as it is computed."""
        return min(output.count, TILE) * DTYPES[self._plan.dtype_made(output)].bits // 8

    def _results(self, tiles: int) -> int:
        """So many tiles of results per thread."""
        return tiles * self._threads * max(map(self._result, self._plan.made), default=0)

    def _counters(self) -> int:
        """Of order statistics: of a tensor, or of the whole model."""
        method = self._plan.method
        tensors = [output.tensor for output in self._plan.made if output.tensor is not None]
        together = sum if method.survey is not None else max
        if not tensors or together(tensor.count for tensor in tensors) <= SAMPLED_WHOLE:
            return 0
        return counters(max(method.searches(tensor) for tensor in tensors), self._threads)

    def problems(self) -> Iterator[str]:
        """Too little: the least is told."""
        if self.peak > self._memory:
            alone = replace(self._plan, options=replace(self._plan.options, threads=1)).budget.peak
            fewer = f" ({_mebibytes(alone)}MiB with one)" if alone < self.peak else ""
            threads = f"{self._threads} thread{'s' if self._threads > 1 else ''}{fewer}"
            yield f"memory: {_mebibytes(self.peak)}MiB are needed with {threads}, {self._memory >> 20}MiB allowed"


def _mebibytes(nbytes: int) -> int:
    """So much is enough: rounded up, and no less than --memory takes."""
    return -(-max(nbytes, LEAST_MEMORY) // (1 << 20))

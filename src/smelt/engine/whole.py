"""Outputs that are matrix functions: called on whole operands or some of their rows, and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import OperationFailed, show
from ..kernels.blas import one_thread
from ..kernels.dtypes import DTYPES, narrowed
from ..kernels.generate import precision_of
from ..kernels.program import Copy, Operand, Whole, row_length
from .device import Mapper, nonfinite
from .matrices import called, called_in_strips, rows_called
from .tiles import TILE, BufferPool, Tile

if TYPE_CHECKING:
    from .jobs import Job, Sink


def run_whole(output: Whole, job: Job, tile: Tile, mapper: Mapper, sink: Sink, buffers: BufferPool) -> None:
    """Call the function on whole arrays, or on sources, and write what it gives; ``tile`` is the whole tensor.

    Decompositions may never end on NaN: what is let pass is 0 for the function, and NaN in the result.
    """
    shape, gaps = job.inputs[0].shape, Gaps()
    precision = np.dtype(precision_of(output.call))

    def source(operand: Operand) -> Reader:
        own = gaps if operand.shape == shape else Gaps()
        return Reader(operand, job.name, precision, own, tile, mapper, buffers)

    first = 0
    tile.bytes_read += sum(change.nbytes for change in output.call.changes)
    with one_thread():
        for part in _results(output, source, (0, job.count), shape):
            if output.shape is not None and gaps:
                why = "a task vector with NaN or Inf has no factors: exclude it"
                raise OperationFailed(f"tensor {show(job.name)}: {why}")
            _write(part, first, job, sink, buffers, gaps)
            first += part.size


def _results(
    output: Whole, source: Callable[[Operand], Reader], span: tuple[int, int], shape: tuple[int, ...]
) -> Iterator[npt.NDArray[Any]]:
    if output.strips:
        yield from called_in_strips(output.call, source)
    else:
        yield called(output.call, lambda operand: source(operand).all(), span, shape)


class Gaps(dict[int, npt.NDArray[np.bool_]]):
    """Where values are NaN or infinite: first element -> one truth value per element, of the tiles that have any."""

    def note(self, start: int, found: npt.NDArray[np.bool_]) -> None:
        self[start] = self[start] | found if start in self else found

    def between(self, start: int, end: int) -> npt.NDArray[np.intp]:
        """The elements, counted from ``start``."""
        found = [first + np.flatnonzero(bad) for first, bad in sorted(self.items())]
        places = np.concatenate(found or [np.zeros(0, np.intp)])
        return places[(places >= start) & (places < end)] - start


@dataclass(eq=False)
class Reader:
    """A :class:`~smelt.kernels.program.Source`, read tile by tile through the map pass.

    That pass knows what becomes of NaN and Inf; here they are 0, and noted in ``gaps``. The tile that was read last
    is kept, for the rows that begin in it.
    """

    operand: Operand
    name: str
    precision: np.dtype[Any]
    gaps: Gaps
    whole: Tile
    mapper: Mapper
    buffers: BufferPool
    _at: int = -1
    _values: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0))
    _seen: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        shape = self.operand.shape
        return (shape[0] if shape else 1), prod(shape[1:])

    def all(self) -> npt.NDArray[Any]:
        """Everything, in the operand's own shape."""
        return self._elements(0, self.operand.count).reshape(self.operand.shape)

    def rows(self, first: int, last: int) -> npt.NDArray[Any]:
        length = self.shape[1]
        return self._elements(first * length, last * length).reshape(-1, length)

    def _elements(self, first: int, last: int) -> npt.NDArray[Any]:
        out = np.empty(last - first, self.precision)
        for start in range(first // TILE * TILE, last, TILE):
            values = self._tile(start)
            low, high = max(start, first), min(start + len(values), last)
            out[low - first : high - first] = values[low - start : high - start]
        return out

    def _tile(self, start: int) -> npt.NDArray[Any]:
        if start != self._at:
            operand, count = self.operand, min(TILE, self.operand.count - start)
            tile, dtype = Tile(start, count, self.buffers), DTYPES[operand.dtype]
            stored = np.empty(count, dtype.storage)
            self.mapper(self.name, Copy(operand), operand.dtype, tile, stored)
            if start >= self._seen:
                self.whole.bytes_read, self._seen = self.whole.bytes_read + tile.bytes_read, start + count
            tile.release()
            self._at, self._values = start, self._clean(start, dtype.as_values(stored).astype(self.precision))
        return self._values

    def _clean(self, start: int, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        finite = np.isfinite(values)
        if not finite.all():
            self.gaps.note(start, ~finite)
            values[~finite] = 0
        return values


def run_rows(output: Whole, job: Job, tile: Tile, sink: Sink, buffers: BufferPool) -> None:
    """Call the function on the rows of one tile and write its result."""
    _write(rows_called(output.call, tile, row_length(job.inputs[0].shape)), tile.start, job, sink, buffers)


def read_whole(operand: Operand) -> npt.NDArray[Any]:
    """All values of an operand, in its shape."""
    dtype = DTYPES[operand.dtype]
    stored = np.empty(operand.count, dtype.storage)
    for start in range(0, operand.count, TILE):
        operand.read(start, stored[start : start + TILE])
    return dtype.as_values(stored).reshape(operand.shape)


def _write(
    result: npt.NDArray[Any], first: int, job: Job, sink: Sink, buffers: BufferPool, gaps: Gaps | None = None
) -> None:
    """Store the values from element ``first`` on, each rounded once; NaN at the ``gaps``."""
    flat = result.reshape(-1)
    dtype = DTYPES[job.dtype]
    for start in range(0, len(flat), TILE):
        part = flat[start : start + TILE]
        out = buffers.take(len(part), job.dtype)
        once = narrowed(part) if part.dtype == np.float64 and dtype.bits == 16 else part
        dtype.as_values(out)[:] = once.astype(dtype.values)
        if nonfinite(out, job.dtype).any():
            raise OperationFailed(f"tensor {show(job.name)}: the result holds NaN or Inf")
        if gaps:
            dtype.as_values(out)[gaps.between(first + start, first + start + len(part))] = np.nan
        sink.write(job.name, first + start, out, lambda out=out: buffers.give(out))  # type: ignore[misc]

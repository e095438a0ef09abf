"""Matrix functions: whole operands, or some of their rows, as arrays of the computing precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import OperationFailed, show
from ..kernels import random
from ..kernels.dtypes import DTYPES, narrowed
from ..kernels.generate import precision_of
from ..kernels.program import Call, Draw, Mask, Operand, Whole
from .device import nonfinite
from .tiles import TILE, BufferPool, Tile, row_length

if TYPE_CHECKING:
    from .execute import Job, Sink

#: Gives the stored elements of an operand, and whatever shape they are wanted in.
Reader = Callable[[Operand], npt.NDArray[Any]]


def run_whole(output: Whole, job: Job, sink: Sink, buffers: BufferPool) -> None:
    """Call the function on whole arrays and write its result tile by tile."""
    shape = job.inputs[0].shape
    result = _called(output.call, read_whole, (0, job.count), shape)
    _write(result, 0, job, sink, buffers)


def run_rows(output: Whole, job: Job, tile: Tile, sink: Sink, buffers: BufferPool) -> None:
    """Call the function on the rows of one tile and write its result."""
    _write(rows_called(output.call, tile), tile.start, job, sink, buffers)


def rows_called(call: Call, tile: Tile) -> npt.NDArray[Any]:
    """What a function of rows returns for the rows of one tile."""
    shape = (-1, row_length(call.operands()[0].shape))

    def read(operand: Operand) -> npt.NDArray[Any]:
        return DTYPES[operand.dtype].as_values(tile(operand)).reshape(-1, row_length(operand.shape))

    return _called(call, read, (tile.start, tile.count), shape)


def read_whole(operand: Operand) -> npt.NDArray[Any]:
    """All values of an operand, in its shape."""
    dtype = DTYPES[operand.dtype]
    stored = np.empty(operand.count, dtype.storage)
    for start in range(0, operand.count, TILE):
        operand.read(start, stored[start : start + TILE])
    return dtype.as_values(stored).reshape(operand.shape)


def _called(call: Call, read: Reader, span: tuple[int, int], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    precision = np.dtype(precision_of(call))
    with np.errstate(all="ignore"):
        return np.asarray(call.formula(**_arguments(call.arguments, read, span, shape, precision)))


def _arguments(
    given: Mapping[str, Any], read: Reader, span: tuple[int, int], shape: tuple[int, ...], precision: np.dtype[Any]
) -> dict[str, Any]:
    """Operands as arrays, draws and masks as booleans, all else as it is. ``span``: first element, how many."""

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one(item) for item in value)
        if isinstance(value, Draw):
            return (random.words(value.key, *span) >= value.threshold).reshape(shape)
        if isinstance(value, Mask):
            return read(value.operand) != 0
        return read(value).astype(precision) if hasattr(value, "read") else value

    return {name: one(value) for name, value in given.items()}


def _write(result: npt.NDArray[Any], first: int, job: Job, sink: Sink, buffers: BufferPool) -> None:
    """Store the values from element ``first`` on, each rounded once."""
    flat = result.reshape(-1)
    dtype = DTYPES[job.dtype]
    for start in range(0, len(flat), TILE):
        part = flat[start : start + TILE]
        out = buffers.take(len(part), job.dtype)
        once = narrowed(part) if part.dtype == np.float64 and dtype.bits == 16 else part
        dtype.as_values(out)[:] = once.astype(dtype.values)
        if nonfinite(out, job.dtype).any():
            raise OperationFailed(f"tensor {show(job.name)}: the result holds NaN or Inf")
        sink.write(job.name, first + start, out, lambda out=out: buffers.give(out))  # type: ignore[misc]

"""Outputs that are matrix functions: called on whole operands or some of their rows, and written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import OperationFailed, show
from ..kernels.dtypes import DTYPES, narrowed
from ..kernels.program import Operand, Whole
from .device import nonfinite
from .matrices import called, rows_called
from .tiles import TILE, BufferPool, Tile

if TYPE_CHECKING:
    from .execute import Job, Sink


def run_whole(output: Whole, job: Job, sink: Sink, buffers: BufferPool) -> None:
    """Call the function on whole arrays and write its result tile by tile."""
    shape = job.inputs[0].shape
    result = called(output.call, read_whole, (0, job.count), shape)
    _write(result, 0, job, sink, buffers)


def run_rows(output: Whole, job: Job, tile: Tile, sink: Sink, buffers: BufferPool) -> None:
    """Call the function on the rows of one tile and write its result."""
    _write(rows_called(output.call, tile), tile.start, job, sink, buffers)


def read_whole(operand: Operand) -> npt.NDArray[Any]:
    """All values of an operand, in its shape."""
    dtype = DTYPES[operand.dtype]
    stored = np.empty(operand.count, dtype.storage)
    for start in range(0, operand.count, TILE):
        operand.read(start, stored[start : start + TILE])
    return dtype.as_values(stored).reshape(operand.shape)


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

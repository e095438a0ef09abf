"""Outputs that are matrix functions: called on whole operands or some of their rows, and written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import OperationFailed, show
from ..kernels.blas import one_thread
from ..kernels.dtypes import DTYPES, narrowed
from ..kernels.program import Copy, Operand, Whole, row_length
from .device import Mapper, nonfinite
from .matrices import called, rows_called
from .tiles import TILE, BufferPool, Tile

if TYPE_CHECKING:
    from .execute import Job, Sink


def run_whole(output: Whole, job: Job, tile: Tile, mapper: Mapper, sink: Sink, buffers: BufferPool) -> None:
    """Call the function on whole arrays and write its result tile by tile; ``tile`` is the whole tensor.

    Decompositions may never end on NaN: what is let pass is 0 for the function, and NaN in the result.
    """
    shape = job.inputs[0].shape
    gaps = np.zeros(shape, np.bool_)

    def read(operand: Operand) -> npt.NDArray[Any]:
        values = _read_checked(operand, job.name, tile, mapper, buffers)
        finite = np.isfinite(values)
        if finite.all():
            return values
        if values.shape == shape:
            np.logical_or(gaps, ~finite, out=gaps)
        return np.where(finite, values, np.zeros((), values.dtype))

    with one_thread():
        result = called(output.call, read, (0, job.count), shape)
    if output.shape is not None and gaps.any():
        raise OperationFailed(f"tensor {show(job.name)}: a task vector with NaN or Inf has no factors: exclude it")
    _write(result, 0, job, sink, buffers, gaps.reshape(-1) if gaps.any() else None)


def _read_checked(operand: Operand, name: str, whole: Tile, mapper: Mapper, buffers: BufferPool) -> npt.NDArray[Any]:
    """As :func:`read_whole`, tile by tile through the map pass, which knows what becomes of NaN and Inf."""
    dtype = DTYPES[operand.dtype]
    stored = np.empty(operand.count, dtype.storage)
    for start in range(0, operand.count, TILE):
        tile = Tile(start, min(TILE, operand.count - start), buffers)
        mapper(name, Copy(operand), operand.dtype, tile, stored[start : start + tile.count])
        whole.bytes_read += tile.bytes_read
        tile.release()
    return dtype.as_values(stored).reshape(operand.shape)


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
    result: npt.NDArray[Any], first: int, job: Job, sink: Sink, buffers: BufferPool,
    gaps: npt.NDArray[np.bool_] | None = None,
) -> None:  # fmt: skip
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
        if gaps is not None:
            dtype.as_values(out)[gaps[start : start + TILE]] = np.nan
        sink.write(job.name, first + start, out, lambda out=out: buffers.give(out))  # type: ignore[misc]

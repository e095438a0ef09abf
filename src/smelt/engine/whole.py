"""Matrix functions: whole operands in memory, the whole output at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import OperationFailed, show
from ..kernels import random
from ..kernels.dtypes import DTYPES, narrowed
from ..kernels.generate import precision_of
from ..kernels.program import Draw, Mask, Operand, Whole
from .device import nonfinite
from .tiles import TILE, BufferPool

if TYPE_CHECKING:
    from .execute import Job, Sink


def run_whole(output: Whole, job: Job, sink: Sink, buffers: BufferPool) -> None:
    """Call the function on whole arrays and write its result tile by tile."""
    precision = np.dtype(precision_of(output.call))
    arguments = {name: _argument(value, job, precision) for name, value in output.arguments.items()}
    result = np.asarray(output.function(**arguments), precision).reshape(-1)
    dtype = DTYPES[job.dtype]
    for start in range(0, job.count, TILE):
        part = result[start : start + TILE]
        out = buffers.take(len(part), job.dtype)
        once = narrowed(part) if part.dtype == np.float64 and dtype.bits == 16 else part
        dtype.as_values(out)[:] = once.astype(dtype.values)
        if nonfinite(out, job.dtype).any():
            raise OperationFailed(f"tensor {show(job.name)}: the result holds NaN or Inf")
        sink.write(job.name, start, out, lambda out=out: buffers.give(out))  # type: ignore[misc]


def _argument(value: Any, job: Job, precision: np.dtype[Any]) -> Any:
    if isinstance(value, tuple):
        return tuple(_argument(item, job, precision) for item in value)
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Draw):
        words = random.words(value.key, 0, job.count)
        return (words >= value.threshold).reshape(job.inputs[0].shape)
    if isinstance(value, Mask):
        return read_whole(value.operand) != 0
    return read_whole(value).astype(precision)


def read_whole(operand: Operand) -> npt.NDArray[Any]:
    """All values of an operand, in its shape."""
    dtype = DTYPES[operand.dtype]
    stored = np.empty(operand.count, dtype.storage)
    for start in range(0, operand.count, TILE):
        operand.read(start, stored[start : start + TILE])
    return dtype.as_values(stored).reshape(operand.shape)

"""One open GGUF file: elements of its tensors, unpacked."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import OperationFailed, show
from ...kernels.blocks import unpack
from ...kernels.dtypes import DTYPES
from ..stored import Stored
from .format import PLAIN, StoredTensor, bytes_of, elements_of
from .header import read_header

#: Elements that are unpacked at a time: their blocks stay in the fast caches.
_SLAB = 1 << 16


class GgufFile:
    """Its header parsed. ``identity`` is what the file was at that moment."""

    def __init__(self, stored: Stored) -> None:
        self._stored, self.identity = stored, stored.identity
        self._scratch = threading.local()
        try:
            self.header = read_header(stored)
        except BaseException:
            self.close()
            raise

    def read(self, tensor: StoredTensor, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` with elements from ``start`` on: as they are stored, or float32 unpacked. Thread-safe."""
        try:
            if tensor.kind in PLAIN:
                self._stored.read_into(out.data, tensor.offset + start * out.itemsize)
            else:
                self._unpack(tensor, start, out)
        except OperationFailed as error:
            raise OperationFailed(f"tensor {show(tensor.name)}: {error}") from error

    def read_rows(self, tensor: StoredTensor, rows: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        """Fill the rows of ``out`` (2-D, contiguous) with whole rows of the tensor, in any order."""
        size = bytes_of(tensor.kind, out.shape[1])
        if tensor.kind in PLAIN:
            self._gather(tensor, rows, size, out)
            return
        step = max(1, _SLAB // out.shape[1])
        for first in range(0, len(rows), step):
            part = out[first : first + step]
            packed = self._buffer(len(part) * size)
            self._gather(tensor, rows[first : first + step], size, packed)
            unpack(tensor.kind, packed, part.reshape(-1))

    def _gather(self, tensor: StoredTensor, rows: npt.NDArray[np.int64], size: int, out: npt.NDArray[Any]) -> None:
        try:
            self._stored.read_runs(out.data, (rows * size + tensor.offset).tolist())
        except OperationFailed as error:
            raise OperationFailed(f"tensor {show(tensor.name)}: {error}") from error

    def _unpack(self, tensor: StoredTensor, start: int, out: npt.NDArray[np.float32]) -> None:
        """Blocks that are wanted whole go straight into ``out``, those at the edges through a small array."""
        step, done = elements_of(tensor.kind), 0
        while done < len(out):
            block, lead = divmod(start + done, step)
            count = min(step - lead if lead else max(step, (len(out) - done) // step * step), _SLAB, len(out) - done)
            blocks = self._blocks(tensor, block, -(-(lead + count) // step))
            if lead or count % step:
                whole = np.empty(step, np.float32)
                unpack(tensor.kind, blocks, whole)
                out[done : done + count] = whole[lead : lead + count]
            else:
                unpack(tensor.kind, blocks, out[done : done + count])
            done += count

    def _blocks(self, tensor: StoredTensor, first: int, count: int) -> npt.NDArray[np.uint8]:
        size = bytes_of(tensor.kind, elements_of(tensor.kind))
        packed = self._buffer(count * size)
        self._stored.read_into(packed.data, tensor.offset + first * size)
        return packed

    def _buffer(self, size: int) -> npt.NDArray[np.uint8]:
        """This thread's bytes for packed blocks, good until it asks again."""
        held = getattr(self._scratch, "bytes", None)
        if held is None or len(held) < size:
            held = self._scratch.bytes = np.empty(size, np.uint8)
        return held[:size]

    def whole(self, tensor: StoredTensor) -> npt.NDArray[Any]:
        """All of a small tensor as values, in its own shape."""
        dtype = DTYPES[tensor.kind if tensor.kind in PLAIN else "F32"]
        out = np.empty(tensor.count, dtype.storage)
        self.read(tensor, 0, out)
        return dtype.as_values(out).reshape(tensor.shape)

    def check_unchanged(self) -> None:
        """Raise OperationFailed when the name no longer leads to the file as it was opened."""
        self._stored.check_unchanged()

    def close(self) -> None:
        self._stored.close()

"""Results that wait on the disk until it is known how large the output will be."""

from __future__ import annotations

import threading
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import storage
from ..kernels.dtypes import code_of


class Spool:
    """A nameless file beside the destination that arrays are appended to. Thread-safe; gone when closed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor = storage.unnamed(folder)
        self._end = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exception: object) -> None:
        storage.close(self._descriptor)

    def put(self, array: npt.NDArray[Any]) -> Spooled:
        """Keep an array; what is returned reads it back."""
        with self._lock:
            offset, self._end = self._end, self._end + array.nbytes
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        storage.pwrite_all(self._descriptor, flat.data, offset, self._folder)
        return Spooled(self._descriptor, offset, code_of(array.dtype), array.shape)


class Spooled:
    """An operand in a spool."""

    def __init__(self, descriptor: int, offset: int, dtype: str, shape: tuple[int, ...]) -> None:
        self._descriptor, self._offset = descriptor, offset
        self.dtype, self.shape, self.count = dtype, shape, prod(shape)

    def read(self, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` (storage type) with elements from ``start`` on."""
        storage.pread_into(self._descriptor, out.data, self._offset + start * out.itemsize, "a scratch file")

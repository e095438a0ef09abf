"""One number per row or per column of a tensor, as an operand of element formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class PerRow:
    """``values[r]`` at every element of row r (the last axis is the row); float32."""

    dtype = "F32"

    def __init__(self, values: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.count = int(np.prod(shape))
        self._values = np.asarray(values, np.float32).reshape(-1)
        self._length = self.count // max(1, len(self._values))

    def read(self, start: int, out: npt.NDArray[Any]) -> None:
        first, last = start // self._length, (start + len(out) - 1) // self._length
        run = np.repeat(self._values[first : last + 1], self._length)
        out[:] = run[start - first * self._length :][: len(out)]


class PerColumn:
    """``values[c]`` at every element of column c (the position on the last axis); float32."""

    dtype = "F32"

    def __init__(self, values: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.count = int(np.prod(shape))
        self._values = np.asarray(values, np.float32).reshape(-1)

    def read(self, start: int, out: npt.NDArray[Any]) -> None:
        shift = start % len(self._values)
        out[:] = np.resize(np.roll(self._values, -shift), len(out))

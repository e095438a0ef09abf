"""What is known per row, per column or in few factors, as operands of element formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .dtypes import DTYPES
from .program import Operand


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
        length = len(self._values)
        head = min(-start % length, len(out))
        rows, tail = divmod(len(out) - head, length)
        out[:head] = self._values[start % length :][:head]
        out[head : len(out) - tail].reshape(rows, length)[:] = self._values
        out[len(out) - tail :] = self._values[:tail]


class LowRank:
    """``left @ right`` at every element of a matrix, and nothing below 0; float32.

    ``left`` is (rows, r), ``right`` (r, columns); the r products are added in order.
    """

    dtype = "F32"

    def __init__(self, left: npt.NDArray[Any], right: npt.NDArray[Any]) -> None:
        self.shape = (len(left), right.shape[1])
        self.count = len(left) * right.shape[1]
        self._left, self._right = np.asarray(left, np.float32), np.asarray(right, np.float32)

    def read(self, start: int, out: npt.NDArray[Any]) -> None:
        length = self.shape[1]
        first, last = start // length, (start + len(out) - 1) // length
        rows = self._left[first : last + 1]
        block = np.zeros((len(rows), length), np.float32)
        for column, row in zip(rows.T, self._right, strict=True):
            block += column[:, None] * row
        out[:] = np.maximum(block, 0).reshape(-1)[start - first * length :][: len(out)]


def rank_one(rows: npt.NDArray[Any], columns: npt.NDArray[Any]) -> LowRank:
    """The matrix of rank one with these sums of rows and of columns: r c / sum(r); zeros where that vanishes."""
    total = float(np.sum(rows, dtype=np.float64))
    left = np.asarray(rows, np.float64) / total if total > 0 else np.zeros(len(rows))
    return LowRank(left[:, None], np.asarray(columns)[None, :])


def vector(operand: Operand) -> npt.NDArray[np.float64]:
    """All elements of a small operand, in its shape: what is known per column, or once per tensor."""
    dtype = DTYPES[operand.dtype]
    stored = np.empty(operand.count, dtype.storage)
    operand.read(0, stored)
    return dtype.as_values(stored).astype(np.float64).reshape(operand.shape)

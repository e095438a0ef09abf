"""What is done to the values of a tensor, on any run of its elements, in fp32 and with the same bits for any run.

``out`` holds the elements start .. start + len(out) of a tensor in C order, seen as a matrix of its first axis by
the rest. A step works on it in place. ``additive``: it adds something that does not depend on what is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from ...kernels.lowrank import add_product

Floats = npt.NDArray[np.float32]


class Step(Protocol):
    """One operation."""

    additive: ClassVar[bool]

    def apply(self, start: int, out: Floats, weight: float = 1.0) -> None:
        """Do it; ``weight`` is for additive steps only."""


def pieces(start: int, out: npt.NDArray[Any], width: int) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
    """A run as matrices: the row and column of each one's first element, and a view (rows, columns) of ``out``."""
    position = 0
    while position < len(out):
        row, column = divmod(start + position, width)
        rest = len(out) - position
        rows, columns = (rest // width, width) if column == 0 and rest >= width else (1, min(width - column, rest))
        yield row, column, out[position : position + rows * columns].reshape(rows, columns)
        position += rows * columns


@dataclass(frozen=True)
class Products:
    """Add ``scale * left[e] @ right[e]`` to each of a stack of matrices: (e, rows, r) and (e, r, columns)."""

    left: Floats
    right: Floats
    scale: float
    additive: ClassVar[bool] = True

    def apply(self, start: int, out: Floats, weight: float = 1.0) -> None:
        size = self.left.shape[1] * self.right.shape[2]
        for number in range(start // size, -(-(start + len(out)) // size)):
            low, high = max(start, number * size), min(start + len(out), (number + 1) * size)
            run = out[low - start : high - start]
            add_product(self.left[number], self.right[number], weight * self.scale, low - number * size, run)


@dataclass(frozen=True)
class ProductOfTwo:
    """Add ``scale * (a b) * (c d)``, where a, c: (rows, r) and b, d: (r, columns)."""

    factors: tuple[Floats, Floats, Floats, Floats]
    scale: float
    additive: ClassVar[bool] = True

    def apply(self, start: int, out: Floats, weight: float = 1.0) -> None:
        a, b, c, d = self.factors
        first, second = np.zeros_like(out), np.zeros_like(out)
        add_product(a, b, 1.0, start, first)
        add_product(c, d, 1.0, start, second)
        first *= second
        first *= np.float32(weight * self.scale)
        out += first


@dataclass(frozen=True)
class Outer:
    """Add ``scale * (left (x) right)``, the Kronecker product of (a, b) and (c, d); further axes of right stay last."""

    left: Floats
    right: Floats
    scale: float
    additive: ClassVar[bool] = True

    def apply(self, start: int, out: Floats, weight: float = 1.0) -> None:
        width = self.left.shape[1] * self.right[0].size
        for row, column, view in pieces(start, out, width):
            number, inner = divmod(np.arange(row, row + len(view)), len(self.right))
            right = self.right[inner].reshape(len(view), 1, -1)
            whole = (self.left[number][:, :, None] * right).reshape(len(view), width)
            view += np.float32(weight * self.scale) * whole[:, column : column + view.shape[1]]


@dataclass(frozen=True)
class Offset:
    """Add ``scale`` times a tensor of the same shape."""

    values: Floats
    scale: float
    additive: ClassVar[bool] = True

    def apply(self, start: int, out: Floats, weight: float = 1.0) -> None:
        out += np.float32(weight * self.scale) * self.values.reshape(-1)[start : start + len(out)]


@dataclass(frozen=True)
class AddedEntries:
    """Add ``values`` (k,) to the elements at ``index`` (k,), ascending."""

    index: npt.NDArray[np.uint32]
    values: Floats
    additive: ClassVar[bool] = True

    def apply(self, start: int, out: Floats, weight: float = 1.0) -> None:
        low, high = np.searchsorted(self.index, (start, start + len(out)))
        out[self.index[low:high].astype(np.int64) - start] += np.float32(weight) * self.values[low:high]


@dataclass(frozen=True)
class AddedSigns:
    """Add ``scale`` where the bit is 1, take it away elsewhere: eight elements a byte, the highest bit first."""

    bits: npt.NDArray[np.uint8]
    scale: float
    additive: ClassVar[bool] = True

    def apply(self, start: int, out: Floats, weight: float = 1.0) -> None:
        first = start // 8
        ones = np.unpackbits(self.bits[first : -(-(start + len(out)) // 8)])[start - 8 * first :][: len(out)]
        scale = np.float32(weight * self.scale)
        out += np.where(ones, scale, -scale)


@dataclass(frozen=True)
class Multiply:
    """Multiply rows (axis 0) or columns (axis 1) of the matrix (-, width) by a vector."""

    vector: Floats
    axis: int
    width: int
    additive: ClassVar[bool] = False

    def apply(self, start: int, out: Floats, weight: float = 1.0) -> None:
        for row, column, view in pieces(start, out, self.width):
            rows, columns = view.shape
            view *= self.vector[row : row + rows, None] if self.axis == 0 else self.vector[column : column + columns]


@dataclass(frozen=True)
class Norms:
    """Give rows (axis 0) or columns (axis 1) these norms: DoRA. Becomes :class:`Multiply` once theirs are known."""

    magnitudes: Floats
    axis: int
    width: int
    additive: ClassVar[bool] = False

    def apply(self, start: int, out: Floats, weight: float = 1.0) -> None:
        raise TypeError("the norms are not measured yet")

    def measured(self, slabs: Iterator[Floats]) -> Multiply:
        """From all values in order, in slabs of whole rows that are always the same: sums in fp64."""
        squares = [np.square(slab.reshape(-1, self.width), dtype=np.float64).sum(axis=1 - self.axis) for slab in slabs]
        total = np.concatenate(squares) if self.axis == 0 else np.sum(squares, axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros gives NaN, which is reported as such
            return Multiply(self.magnitudes / np.sqrt(total).astype(np.float32), self.axis, self.width)


@dataclass(frozen=True)
class NewRows:
    """Replace some rows: ``rows`` sorted, ``values`` (rows, width)."""

    rows: npt.NDArray[np.int64]
    values: Floats
    additive: ClassVar[bool] = False

    def apply(self, start: int, out: Floats, weight: float = 1.0) -> None:
        for row, column, view in pieces(start, out, self.values.shape[1]):
            low, high = np.searchsorted(self.rows, (row, row + len(view)))
            view[self.rows[low:high] - row] = self.values[low:high, column : column + view.shape[1]]

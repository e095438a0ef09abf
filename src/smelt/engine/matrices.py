"""Functions of whole matrices, or of some of their rows: their arguments as arrays of the computing precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..kernels import random
from ..kernels.dtypes import DTYPES
from ..kernels.generate import precision_of
from ..kernels.program import ByRow, Call, Change, Draw, Mask, Operand, Source

if TYPE_CHECKING:
    from .tiles import Tile

#: Gives the values of an operand in the shape and the precision that the function is to see, as an array of one's own.
Reader = Callable[[Operand], npt.NDArray[Any]]


#: Elements for which an operand is computed at a time: few, so that the function's own arrays stay small.
_STRIP = 1 << 16


def rows_called(call: Call, tile: Tile, length: int) -> npt.NDArray[Any]:
    """What a function of rows, of ``length`` elements each, returns for the rows of one tile."""
    return _rows(call, tile, length, 0, tile.count)


def compute(operand: ByRow, tile: Tile, out: npt.NDArray[Any]) -> None:
    """Fill ``out`` with an operand's elements for the rows of one tile, a few rows at a time."""
    step = max(1, _STRIP // operand.row) * operand.row
    for first in range(0, tile.count, step):
        count = min(step, tile.count - first)
        out[first : first + count] = _rows(operand.call, tile, operand.row, first, count).reshape(-1)


def _rows(call: Call, tile: Tile, length: int, first: int, count: int) -> npt.NDArray[Any]:
    """The function's result for ``count`` elements of the tile from ``first`` on, in rows of ``length``."""

    precision = np.dtype(precision_of(call))

    def read(operand: Operand) -> npt.NDArray[Any]:
        values = DTYPES[operand.dtype].as_values(tile(operand)[first : first + count])
        return values.astype(precision).reshape(-1, length)

    return called(call, read, (tile.start + first, count), (-1, length))


def called(call: Call, read: Reader, span: tuple[int, int], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The function's result. ``span``: the first element that it is about, and how many."""
    with np.errstate(all="ignore"):
        return np.asarray(call.formula(**_arguments(call.arguments, read, span, shape)))


def called_in_strips(call: Call, source: Callable[[Operand], Source]) -> Iterator[npt.NDArray[Any]]:
    """What a function of sources yields."""

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one(item) for item in value)
        if isinstance(value, Change):
            return value.operand.factors()
        return source(value) if hasattr(value, "read") else value

    with np.errstate(all="ignore"):
        yield from call.formula(**{name: one(value) for name, value in call.arguments.items()})


def _arguments(given: Mapping[str, Any], read: Reader, span: tuple[int, int], shape: tuple[int, ...]) -> dict[str, Any]:
    """Operands as arrays, draws and masks as booleans, changes as factors, all else as it is.

    ``span``: first element, how many.
    """

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one(item) for item in value)
        if isinstance(value, Draw):
            density = value.density if value.threshold is not None else read(value.density).reshape(-1)
            return random.drawn(random.words(value.key, *span), density).reshape(shape)
        if isinstance(value, Mask):
            return read(value.operand) != 0
        if isinstance(value, Change):
            return value.operand.factors()
        return read(value) if isinstance(value, ByRow) or hasattr(value, "read") else value

    return {name: one(value) for name, value in given.items()}

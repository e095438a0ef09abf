"""Run a compiled kernel on one tile: bind the tile's arrays and constants to the generated parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from .compile import kernel_for
from .generate import magnitude_of, precision_of
from .program import SUM_BLOCK, Call, Draw, Mask, Operand, Step
from .random import BLOCK

#: Gives the part of an operand that the tile covers, as stored.
Arrays = Callable[[Operand], npt.NDArray[Any]]

BAD_INPUT, BAD_OUTPUT = 1, 2


def run_map(call: Call, dtype: str, arrays: Arrays, start: int, out: npt.NDArray[Any]) -> int:
    """Compute elements start .. start + len(out) into ``out``, stored as ``dtype``.

    Returns BAD_INPUT | BAD_OUTPUT flags for non-finite values seen.
    """
    kernel = kernel_for("map", call, dtype)
    flags = 0
    for first, last in pieces(call, start, len(out)):
        flags |= kernel(start + first, out[first:last], *_bind(call, arrays, start, first, last))[0]
    return flags


def run_count(
    call: Call, arrays: Arrays, start: int, count: int, low: int, width: int, counts: npt.NDArray[Any]
) -> int:
    """Add the magnitudes of one tile to ``counts``; returns how many lie below ``low``."""
    kernel = kernel_for("count", call)
    return sum(
        kernel(start + first, last - first, low, width, counts, *_bind(call, arrays, start, first, last))[0]
        for first, last in pieces(call, start, count)
    )


def run_equal(call: Call, arrays: Arrays, start: int, count: int, wanted: int) -> npt.NDArray[np.int64]:
    """How many magnitudes of the tile have exactly the bits ``wanted``, for each of its blocks of 1024.

    The tile begins with a block, and the call has no Step.
    """
    found = np.empty(-(-count // BLOCK), np.int64)
    kernel_for("equal", call)(start, count, wanted, found, *_bind(call, arrays, start, 0, count))
    return found


def run_magnitudes(call: Call, arrays: Arrays, start: int, count: int) -> npt.NDArray[Any]:
    """The bits of |value| for each element of the tile, as unsigned integers."""
    kernel = kernel_for("sample", call)
    out = np.empty(count, magnitude_of(precision_of(call)))
    for first, last in pieces(call, start, count):
        kernel(start + first, out[first:last], *_bind(call, arrays, start, first, last))
    return out


def run_sums(call: Call, arrays: Arrays, start: int, count: int, width: int, products: bool) -> npt.NDArray[np.float64]:
    """Block sums of the ``width`` numbers that the formula returns, or of the products of their pairs.

    Returns (blocks, width) or (blocks, width (width + 1) / 2). A Step splits a block in two.
    """
    kernel = kernel_for("sums", call, str(width))
    columns = width * (width + 1) // 2 if products else width
    parts = []
    for first, last in pieces(call, start, count):
        partials = np.empty(-(-(last - first) // SUM_BLOCK) * columns)
        bound = _bind(call, arrays, start, first, last)
        kernel(start + first, last - first, int(products), partials, *bound)
        parts.append(partials.reshape(-1, columns))
    return np.concatenate(parts)


def pieces(call: Call, start: int, count: int) -> Iterator[tuple[int, int]]:
    """Split a tile where a Step changes its value, so that inside a piece every value is constant."""
    cuts = {item.cut - start for item in call.items() if isinstance(item, Step)}
    edges = [0, *sorted(cut for cut in cuts if 0 < cut < count), count]
    yield from pairwise(edges)


def _bind(call: Call, arrays: Arrays, start: int, first: int, last: int) -> list[Any]:
    """The formula's generated parameters, in order, for elements first .. last of the tile."""
    bound: list[Any] = []
    for value in call.arguments.values():
        if isinstance(value, tuple) and value and all(map(_is_value, value)):
            bound.append([_at(item, start + first) for item in value])
        else:
            for item in value if isinstance(value, tuple) else (value,):
                bound.extend(_bind_one(item, arrays, start, first, last))
    return bound


def _bind_one(item: Any, arrays: Arrays, start: int, first: int, last: int) -> list[Any]:
    if isinstance(item, bool):
        return []
    if _is_value(item):
        return [_at(item, start + first)]
    if isinstance(item, Draw):
        own = [] if item.threshold is not None else _bind_one(item.density, arrays, start, first, last)
        return [(*item.key, item.threshold or 0), *own]
    return [arrays(item.operand if isinstance(item, Mask) else item)[first:last]]


def _is_value(item: Any) -> bool:
    return isinstance(item, int | float | Step) and not isinstance(item, bool)


def _at(item: Any, position: int) -> float:
    if isinstance(item, Step):
        return item.before if position < item.cut else item.after
    return float(item)

"""Codes and scales to values: one compiled loop for every form in which quantised matrices are stored.

    value[r, c] = (table[code[r, c]] - zero[g, h]) * scale[g, h] * factor,   g = row_group[r], h = column_group[c]

in float32, each operation rounded, and the product once more to the output's dtype. What differs between
formats is how codes are packed, what they stand for, and which elements share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .dtypes import DTYPES
from .generate import Generated
from .native import Kernel, load

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.uint32]

#: Columns that are worked on at a time: what is in between stays in the fastest cache. Turned: also so many rows.
_STRETCH, _STRETCH_TURNED, _HEIGHT = 1024, 256, 32


@dataclass(frozen=True)
class Packing:
    """How codes of ``bits`` bits (1 to 8) lie: a little-endian string of bits along each row.

    With ``down`` along each column, in words of 32 bits that lie in rows as long as the matrix's.
    """

    bits: int
    down: bool = False


@dataclass(frozen=True)
class Scales:
    """A grid of scales and of zero points (2-D, C-contiguous), and which of them each row and column takes."""

    scale: Floats
    row_group: Indices
    column_group: Indices
    zero: Floats | None = None
    factor: float = 1.0

    def columns(self, first: int, last: int) -> Scales:
        """The same for some of the columns."""
        return replace(self, column_group=self.column_group[first:last])


def dequantise(
    packed: npt.NDArray[Any], stride: int, phase: int, packing: Packing, table: Floats, scales: Scales, dtype: str,
    out: npt.NDArray[Any], *, turned: bool = False,
) -> None:  # fmt: skip
    """Fill ``out`` (rows x columns, or where ``turned`` columns x rows; storage type of ``dtype``, C-contiguous).

    ``packed``: bytes (uint8, 1-D) whose rows are ``stride`` apart, with codes from bit ``phase`` of each row on; for
    codes packed down, words (uint32) in rows, with codes from bit ``phase`` of each column on. One more byte, or row
    of words, than the codes take must be there to be read. ``table``: the values of the 256 codes.
    """
    if not out.size:
        return
    rows, columns = out.shape[::-1] if turned else out.shape
    scale, zero = (plane.reshape(-1) for plane in (scales.scale, scales.scale if scales.zero is None else scales.zero))
    apart = _counts(scales.column_group)
    skipped = int(scales.column_group[0]) if apart else 0
    _kernel(_Form(packing, scales.zero is not None, dtype, turned, bool(table[0] == 0) and _counts(table), apart))(
        rows, columns, phase, stride, packed, table, scale[skipped:], zero[skipped:], scales.scale.shape[1],
        scales.row_group, scales.column_group, scales.factor, out.reshape(-1),
    )  # fmt: skip


def _counts(numbers: npt.NDArray[Any]) -> bool:
    """Whether each is 1 more than the one before: then there is nothing to look up."""
    return bool((numbers == numbers[0] + np.arange(len(numbers))).all())


class _Form(NamedTuple):
    """What a kernel is made for. ``plain``: codes are their own values; ``apart``: every column has its own scale."""

    packing: Packing
    has_zero: bool
    dtype: str
    turned: bool
    plain: bool
    apart: bool


@cache
def _kernel(form: _Form) -> Kernel:
    return load(_generated(form))


def _generated(form: _Form) -> Generated:
    packing, dtype, turned = form.packing, form.dtype, form.turned
    stored, stretch = DTYPES[dtype].storage.__name__, _STRETCH_TURNED if turned else _STRETCH
    parameters = (
        ("rows", "int64"), ("columns", "int64"), ("phase", "int64"), ("stride", "int64"),
        ("packed", "[uint32]" if packing.down else "[uint8]"), ("table", "[float32]"), ("scale", "[float32]"),
        ("zero", "[float32]"), ("width", "int64"), ("row_group", "[uint32]"), ("column_group", "[uint32]"),
        ("factor", "float32"), ("out", f"[{stored}]"),
    )  # fmt: skip
    own = (("codes", "uint8", stretch), ("values", "float32", stretch))
    scratch = (*own, ("block", stored, _HEIGHT * stretch)) if turned else own
    row, code = _down(packing.bits) if packing.down else _along(packing.bits)
    pairs, pair = _PAIRS if packing == Packing(4) else ("0", "uint8(0), uint8(0)")
    value = "float32(codes[i])" if form.plain else "table[codes[i]]"
    group = "uint64(first + i)" if form.apart else "taken[i]"
    text = _HEAD + (_TURNED if turned else _STRAIGHT)
    text = text.format(
        names=", ".join(name for name, *_ in (*parameters, *scratch, ("result",))),
        arguments=", ".join(name for name, *_ in (*parameters[2:-1], *own)),
        value=f"({value} - zero[group + {group}])" if form.has_zero else value,
        row=row, code=code, pairs=pairs, pair=pair, dtype=dtype, stretch=stretch, height=_HEIGHT, group=group,
    )  # fmt: skip
    return Generated(text, parameters, scratch)


def _along(bits: int) -> tuple[str, str]:
    """Where row ``r`` lies, and the code of column ``first + i``, of codes packed along rows."""
    row = "start, shift = uint64(r * stride + (phase >> 3)), uint64(phase & 7)"
    if bits == 8:
        return row, "packed[start + uint64(first + i)]"
    at = f"(shift + uint64((first + i) * {bits}))"
    low = f"packed[start + ({at} >> uint64(3))]"
    high = f"packed[start + ({at} >> uint64(3)) + uint64(1)]"
    word = low if 8 % bits == 0 else f"(uint64({low}) | (uint64({high}) << uint64(8)))"
    return row, f"({word} >> ({at} & uint64(7))) & uint64({(1 << bits) - 1})"


#: Two codes to a byte, where rows begin with whole bytes: how many pairs there are, and one of them.
_PAIRS = (
    "count >> 1 if shift == uint64(0) else 0",
    "packed[start + uint64((first >> 1) + i)] & uint8(15), packed[start + uint64((first >> 1) + i)] >> uint8(4)",
)


def _down(bits: int) -> tuple[str, str]:
    """The same for codes packed down columns; one that crosses a word goes on in the next row of words."""
    place = f"(phase + r * {bits})"
    row = f"start, shift = uint64(({place} >> 5) * stride), uint32({place} & 31)"
    code = "(packed[start + uint64(first + i)] >> shift)"
    if 32 % bits:
        high = "(packed[start + uint64(stride + first + i)] << (uint32(31) - shift)) << uint32(1)"
        code = f"({code} | uint32({high}))"
    return row, f"{code} & uint32({(1 << bits) - 1})"


_HEAD = """import numpy as np
from numba import njit
from numpy import float32, uint8, uint32, uint64
from smelt.kernels.scalars import *
from smelt.kernels.scalars import FAST

@njit(**FAST)
def line(r, first, count, {arguments}, target):
    {row}
    group = uint64(row_group[r]) * uint64(width)
    for i in range({pairs}):
        codes[2 * i], codes[2 * i + 1] = {pair}
    for i in range(2 * ({pairs}), count):
        codes[i] = uint8({code})
    taken = column_group[first : first + count]
    for i in range(count):
        values[i] = {value} * scale[group + {group}] * factor
    for i in range(count):
        target[i] = store_{dtype}(values[i])

@njit(**FAST)
def run({names}):
    for first in range(0, columns, {stretch}):
        count = min({stretch}, columns - first)
"""

_STRAIGHT = """        for r in range(rows):
            line(r, first, count, {arguments}, out[r * columns + first : r * columns + first + count])
"""

#: Some rows are made and then written as columns, so that what is written to a row of ``out`` fills cache lines.
_TURNED = """        for above in range(0, rows, {height}):
            height = min({height}, rows - above)
            for k in range(height):
                line(above + k, first, count, {arguments}, block[k * {stretch} : k * {stretch} + count])
            for i in range(count):
                target = out[(first + i) * rows + above : (first + i) * rows + above + height]
                for k in range(height):
                    target[k] = block[k * {stretch} + i]
"""

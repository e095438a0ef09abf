"""Codes and scales to values: one compiled loop for every form in which quantised matrices are stored.

    value[r, c] = (table[code[r, c]] - zero[g, h]) * scale[g, h] * factor,   g = row_group[r], h = column_group[c]

in float32, each operation rounded, and the product once more to the output's dtype. What differs between
formats is how codes are packed, what they stand for, and which elements share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .dtypes import DTYPES
from .generate import Generated
from .native import Kernel, load

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.uint32]

#: Columns that are worked on at a time: what is in between stays in the fastest cache.
_STRETCH = 1024


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

    def rows(self, first: int, last: int) -> Scales:
        """The same for some of the rows."""
        return replace(self, row_group=self.row_group[first:last])

    def columns(self, first: int, last: int) -> Scales:
        """The same for some of the columns."""
        return replace(self, column_group=self.column_group[first:last])


def dequantise(
    packed: npt.NDArray[Any], stride: int, phase: int, packing: Packing, table: Floats, scales: Scales, dtype: str,
    out: npt.NDArray[Any],
) -> None:  # fmt: skip
    """Fill ``out`` (rows x columns, storage type of ``dtype``, C-contiguous) with values.

    ``packed``: bytes (uint8, 1-D) whose rows are ``stride`` apart, each beginning ``phase`` bits after the row does;
    for codes packed down, words (uint32) whose first row holds row ``-phase``. One more byte, or row of words, than
    the codes take must be there to be read. ``table``: the values of the 256 codes.
    """
    if not out.size:
        return
    rows, columns = out.shape
    zero = scales.scale if scales.zero is None else scales.zero
    _kernel(packing, scales.zero is not None, dtype)(
        rows, columns, phase, stride, packed, table, scales.scale.reshape(-1), zero.reshape(-1),
        scales.scale.shape[1], scales.row_group, scales.column_group, scales.factor, out.reshape(-1),
    )  # fmt: skip


@cache
def _kernel(packing: Packing, has_zero: bool, dtype: str) -> Kernel:
    return load(_generated(packing, has_zero, dtype))


def _generated(packing: Packing, has_zero: bool, dtype: str) -> Generated:
    parameters = (
        ("rows", "int64"), ("columns", "int64"), ("phase", "int64"), ("stride", "int64"),
        ("packed", "[uint32]" if packing.down else "[uint8]"), ("table", "[float32]"), ("scale", "[float32]"),
        ("zero", "[float32]"), ("width", "int64"), ("row_group", "[uint32]"), ("column_group", "[uint32]"),
        ("factor", "float32"), ("out", f"[{DTYPES[dtype].storage.__name__}]"),
    )  # fmt: skip
    scratch = (("codes", "uint8", _STRETCH), ("values", "float32", _STRETCH))
    row, code = _down(packing.bits) if packing.down else _along(packing.bits)
    value = "(table[codes[i]] - zero[group + taken[i]])" if has_zero else "table[codes[i]]"
    names = ", ".join(name for name, *_ in (*parameters, *scratch, ("result",)))
    text = _TEMPLATE.format(names=names, row=row, code=code, value=value, dtype=dtype, stretch=_STRETCH)
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


def _down(bits: int) -> tuple[str, str]:
    """The same for codes packed down columns; one that crosses a word goes on in the next row of words."""
    place = f"(phase + r) * {bits}"
    row = f"start, shift = uint64(({place} >> 5) * stride), uint32(({place}) & 31)"
    code = "(packed[start + uint64(first + i)] >> shift)"
    if 32 % bits:
        high = "(packed[start + uint64(stride + first + i)] << (uint32(31) - shift)) << uint32(1)"
        code = f"({code} | uint32({high}))"
    return row, f"{code} & uint32({(1 << bits) - 1})"


_TEMPLATE = """import numpy as np
from numba import njit
from numpy import float32, uint8, uint32, uint64
from smelt.kernels.scalars import *
from smelt.kernels.scalars import FAST

@njit(**FAST)
def run({names}):
    for r in range(rows):
        {row}
        group = uint64(row_group[r]) * uint64(width)
        for first in range(0, columns, {stretch}):
            count = min({stretch}, columns - first)
            for i in range(count):
                codes[i] = uint8({code})
            taken = column_group[first : first + count]
            target = out[r * columns + first : r * columns + first + count]
            for i in range(count):
                values[i] = {value} * scale[group + taken[i]] * factor
            for i in range(count):
                target[i] = store_{dtype}(values[i])
"""

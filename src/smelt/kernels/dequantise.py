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


#: How many columns share a scale, where a kernel is made for that; the longest that fits is taken.
_LENGTHS = (128, 64, 32, 16)


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
    run = 1 if _counts_up(scales.column_group) else _run(scales.column_group)
    skipped = int(scales.column_group[0]) if run == 1 else 0
    plain = bool(table[0] == 0 and _counts_up(table))
    form = _Form(packing, scales.zero is not None, dtype, turned, plain, run)
    _kernel(form)(
        rows, columns, phase, stride, packed, _in_pairs(table) if form.paired else table, scale[skipped:],
        zero[skipped:], scales.scale.shape[1], scales.row_group, scales.column_group, scales.factor,
        out.reshape(-1).view(form.bits) if turned else out.reshape(-1),
    )  # fmt: skip


def _counts_up(numbers: npt.NDArray[Any]) -> bool:
    """Whether each is 1 more than the one before."""
    return bool((numbers == numbers[0] + np.arange(len(numbers))).all())


def _run(groups: Indices) -> int:
    """After how many columns the scale may change, as kernels are made; 0 where that is none of them."""

    def holds(length: int) -> bool:
        runs = groups[: len(groups) // length * length].reshape(-1, length)
        return bool(len(runs) and (runs == runs[:, :1]).all())

    return next(filter(holds, _LENGTHS), 0)


def _in_pairs(table: Floats) -> Floats:
    """The values of both codes of each byte, the lower one's first."""
    codes = np.arange(256)
    return np.stack([table[codes & 15], table[codes >> 4]], axis=1).reshape(-1)


class _Form(NamedTuple):
    """What a kernel is made for.

    ``plain``: codes are their own values; ``run``: after so many columns another scale may come, 0 where each is
    looked up.
    """

    packing: Packing
    has_zero: bool
    dtype: str
    turned: bool
    plain: bool
    run: int

    @property
    def paired(self) -> bool:
        """Whether both codes of a byte are looked up at once."""
        return self.packing == Packing(4) and not self.plain

    @property
    def bits(self) -> type[np.unsignedinteger[Any]]:
        """What a value is as bits."""
        return np.uint16 if DTYPES[self.dtype].bits == 16 else np.uint32


@cache
def _kernel(form: _Form) -> Kernel:
    return load(_generated(form))


def _generated(form: _Form) -> Generated:
    packing, turned = form.packing, form.turned
    stretch = _STRETCH_TURNED if turned else _STRETCH
    stored = (form.bits if turned else DTYPES[form.dtype].storage).__name__
    parameters = (
        ("rows", "int64"), ("columns", "int64"), ("phase", "int64"), ("stride", "int64"),
        ("packed", "[uint32]" if packing.down else "[uint8]"), ("table", "[float32]"), ("scale", "[float32]"),
        ("zero", "[float32]"), ("width", "int64"), ("row_group", "[uint32]"), ("column_group", "[uint32]"),
        ("factor", "float32"), ("out", f"[{stored}]"),
    )  # fmt: skip
    each = 64 // DTYPES[form.dtype].bits
    lines = (("block", stored, each * stretch), ("words", "uint64", _HEIGHT // each * stretch))
    scratch = (("values", "float32", stretch), *(lines if turned else ()))
    row, code = _down(packing.bits) if packing.down else _along(packing.bits)
    text = _LINE + (_RUNS if form.run > 1 else _EACH) + (_TURNED if turned else _STRAIGHT)
    text = text.format(
        names=", ".join(name for name, *_ in (*parameters, *scratch, ("result",))),
        arguments=", ".join((*(name for name, _ in parameters[2:-1]), "values")),
        offset="zero[group + taken[n]]" if form.has_zero else "float32(0)",
        row=row, code=code, pairs=_pairs(form), value=_value(form, code), scaled=_scaled(form), store=_store(form),
        run=form.run, stretch=stretch, height=_HEIGHT, each=each, last=each - 1, size=64 // each, **_woven(each),
    )  # fmt: skip
    return Generated(_HEAD + text, parameters, scratch)


def _store(form: _Form) -> str:
    """The function from a number to what is stored."""
    return "bits_F32" if form.turned and form.dtype == "F32" else f"store_{form.dtype}"


def _value(form: _Form, code: str) -> str:
    """What a code stands for."""
    if form.plain:
        return f"float32(uint8({code}))"
    return f"table[uint64({code}){' * uint64(2)' if form.paired else ''}]"


def _scaled(form: _Form) -> str:
    """A value times its scale."""
    group = "group + uint64(first + i)" if form.run == 1 else "group + taken[i]"
    value = f"(part[i] - zero[{group}])" if form.has_zero else "part[i]"
    return f"{value} * scale[{group}] * factor"


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


def _pairs(form: _Form) -> str:
    """The codes that go two at a time: both of a byte, where rows begin with whole bytes."""
    if form.packing != Packing(4):
        return "    pairs = 0\n"
    return _PAIRS.format(
        low="float32(byte & uint8(15))" if form.plain else "table[uint64(byte) * uint64(2)]",
        high="float32(byte >> uint8(4))" if form.plain else "table[uint64(byte) * uint64(2) + uint64(1)]",
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


def _woven(each: int) -> dict[str, str]:
    """Names of ``each`` rows, the word that their values are as bits, the rows of a block, and the values again."""
    size = 64 // each
    return {
        "rows": ", ".join(f"row{k}" for k in range(each)),
        "word": " | ".join(f"(uint64(row{k}[i]) << uint64({size * k}))" for k in range(each)),
        "lines": ", ".join(f"block[{k} * stretch : {k} * stretch + count]" for k in range(each)),
        "places": ", ".join(f"target[{each} * k + {k}]" for k in range(each)),
        "values": ", ".join(f"uint{size}(word >> uint64({size * k}))" for k in range(each)),
    }


_HEAD = """import numpy as np
from numba import njit
from numpy import float32, uint8, uint16, uint32, uint64
from smelt.kernels.scalars import *
from smelt.kernels.scalars import FAST
"""

_LINE = """
@njit(**FAST)
def line(r, first, count, {arguments}, target):
    {row}
    group = uint64(row_group[r]) * uint64(width)
{pairs}    for i in range(2 * pairs, count):
        values[i] = {value}
    part, taken = values[:count], column_group[first : first + count]
"""

_PAIRS = """    pairs = count >> 1 if shift == uint64(0) else 0
    for i in range(pairs):
        byte = packed[start + uint64((first >> 1) + i)]
        values[2 * i], values[2 * i + 1] = {low}, {high}
"""

_EACH = """    for i in range(count):
        target[i] = {store}({scaled})
"""

#: Loops of a length that is known are vectors; what is left is looked up, which is right everywhere.
_RUNS = """    whole = count // {run} * {run}
    for n in range(0, whole, {run}):
        own, offset = scale[group + taken[n]], {offset}
        some, ready = part[n : n + {run}], target[n : n + {run}]
        for i in range({run}):
            ready[i] = {store}((some[i] - offset) * own * factor)
    part, taken, target = part[whole:], taken[whole:], target[whole:count]
    for i in range(count - whole):
        target[i] = {store}({scaled})
"""

_STRAIGHT = """
@njit(**FAST)
def run({names}):
    for first in range(0, columns, {stretch}):
        count = min({stretch}, columns - first)
        for r in range(rows):
            line(r, first, count, {arguments}, out[r * columns + first : r * columns + first + count])
"""

#: The values of some rows that will be neighbours are woven into one word, so that fewer and wider pieces are moved
#: one by one, and what is written to a row of ``out`` fills a cache line.
_TURNED = """
@njit(**FAST)
def weave(words, {rows}):
    for i in range(words.shape[0]):
        words[i] = {word}

@njit(**FAST)
def run({names}):
    stretch = {stretch}
    for first in range(0, columns, stretch):
        count = min(stretch, columns - first)
        for above in range(0, rows, {height}):
            height = min({height}, rows - above)
            for k in range(height):
                own, at = k % {each} * stretch, k // {each} * stretch
                line(above + k, first, count, {arguments}, block[own : own + count])
                if k % {each} == {last} or k + 1 == height:
                    weave(words[at : at + count], {lines})
            for i in range(count):
                target = out[(first + i) * rows + above : (first + i) * rows + above + height]
                for k in range(height // {each}):
                    word = words[k * stretch + i]
                    {places} = {values}
                for k in range(height // {each} * {each}, height):
                    target[k] = uint{size}(words[k // {each} * stretch + i] >> uint64(k % {each} * {size}))
"""

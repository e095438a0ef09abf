"""Quantised blocks as ggml stores them, to float32 and back.

A tensor is a sequence of blocks of 32 or 256 elements, each with its own scales. The functions here are the
definition of a type: they unpack one ``block`` of bytes into a ``line`` of floats, and are compiled. Every
product and sum is rounded to float32 on its own, as the format's own libraries do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .generate import Generated
from .native import Kernel, load

if TYPE_CHECKING:
    from .scalars import load_F16, store_F16

float32, int8, uint8 = np.float32, np.int8, np.uint8

#: What the codes of the IQ4 types stand for.
LEVELS = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32)

_HEAD = f"""from typing import Any

import numpy as np
from numba import njit
from numpy import float32, int8, uint8
from smelt.kernels.scalars import FAST, load_F16, store_F16

LEVELS = np.array({LEVELS.tolist()}, np.float32)"""

_UNPACK = """@njit(**FAST)
def run(blocks, out, result):
    for n in range(out.shape[0] // {elements}):
        {name}(blocks[n * {size} : (n + 1) * {size}], out[n * {elements} : (n + 1) * {elements}])"""

_PACK = """@njit(**FAST)
def run(values, blocks, result):
    bad = 0
    for n in range(values.shape[0] // {elements}):
        bad += {name}(values[n * {elements} : (n + 1) * {elements}], blocks[n * {size} : (n + 1) * {size}])
    result[0] = bad"""


def _half(block: Any, at: Any) -> Any:
    return load_F16((block[at + 1] << 8) | block[at])


def _scale(block: Any, j: Any) -> Any:
    """The six bits by which sub-block j of Q4_K and Q5_K is multiplied."""
    if j < 4:
        return float32(block[4 + j] & 63)
    return float32((block[8 + j] & 15) | ((block[j] >> 6) << 4))


def _offset(block: Any, j: Any) -> Any:
    """And those of what is subtracted from it."""
    if j < 4:
        return float32(block[8 + j] & 63)
    return float32((block[8 + j] >> 4) | ((block[4 + j] >> 6) << 4))


def _q4_0(block: Any, line: Any) -> None:
    d = _half(block, 0)
    for i in range(16):
        line[i] = d * float32(int8(block[2 + i] & 15) - 8)
    for i in range(16):
        line[16 + i] = d * float32(int8(block[2 + i] >> 4) - 8)


def _q4_1(block: Any, line: Any) -> None:
    d, m = _half(block, 0), _half(block, 2)
    for i in range(16):
        line[i] = d * float32(block[4 + i] & 15) + m
    for i in range(16):
        line[16 + i] = d * float32(block[4 + i] >> 4) + m


def _q5_0(block: Any, line: Any) -> None:
    d = _half(block, 0)
    for i in range(16):
        line[i] = d * float32(((block[6 + i] & 15) | (((block[2 + (i >> 3)] >> (i & 7)) & 1) << 4)) - 16)
    for i in range(16):
        line[16 + i] = d * float32(((block[6 + i] >> 4) | (((block[4 + (i >> 3)] >> (i & 7)) & 1) << 4)) - 16)


def _q5_1(block: Any, line: Any) -> None:
    d, m = _half(block, 0), _half(block, 2)
    for i in range(16):
        line[i] = d * float32((block[8 + i] & 15) | (((block[4 + (i >> 3)] >> (i & 7)) & 1) << 4)) + m
    for i in range(16):
        line[16 + i] = d * float32((block[8 + i] >> 4) | (((block[6 + (i >> 3)] >> (i & 7)) & 1) << 4)) + m


def _q8_0(block: Any, line: Any) -> None:
    d = _half(block, 0)
    for i in range(32):
        line[i] = d * float32(int8(block[2 + i]))


def _q2_k(block: Any, line: Any) -> None:
    d, m = _half(block, 80), _half(block, 82)
    for j in range(16):
        dl, ml = d * float32(block[j] & 15), m * float32(block[j] >> 4)
        at, shift = 16 + (j >> 3) * 32 + (j & 1) * 16, ((j >> 1) & 3) * 2
        codes, part = block[at : at + 16], line[16 * j : 16 * j + 16]
        for i in range(16):
            part[i] = dl * float32((codes[i] >> shift) & 3) - ml


def _q3_k(block: Any, line: Any) -> None:
    d = _half(block, 108)
    for j in range(16):
        low = (block[96 + (j & 7)] >> ((j >> 3) * 4)) & 15
        high = (block[104 + (j & 3)] >> ((j >> 2) * 2)) & 3
        dl = d * float32((low | (high << 4)) - 32)
        at, shift, bit = 32 + (j >> 3) * 32 + (j & 1) * 16, ((j >> 1) & 3) * 2, j >> 1
        codes, part = block[at : at + 16], line[16 * j : 16 * j + 16]
        mask = block[(j & 1) * 16 : (j & 1) * 16 + 16]
        for i in range(16):
            part[i] = dl * float32(((codes[i] >> shift) & 3) + ((mask[i] >> bit) & 1) * 4 - 4)


def _q4_k(block: Any, line: Any) -> None:
    d, m = _half(block, 0), _half(block, 2)
    for j in range(8):
        dl, ml, shift = d * _scale(block, j), m * _offset(block, j), (j & 1) * 4
        codes, part = block[16 + (j >> 1) * 32 : 48 + (j >> 1) * 32], line[32 * j : 32 * j + 32]
        for i in range(32):
            part[i] = dl * float32((codes[i] >> shift) & 15) - ml


def _q5_k(block: Any, line: Any) -> None:
    d, m, high = _half(block, 0), _half(block, 2), block[16:48]
    for j in range(8):
        dl, ml, shift = d * _scale(block, j), m * _offset(block, j), (j & 1) * 4
        codes, part = block[48 + (j >> 1) * 32 : 80 + (j >> 1) * 32], line[32 * j : 32 * j + 32]
        for i in range(32):
            part[i] = dl * float32(((codes[i] >> shift) & 15) | (((high[i] >> j) & 1) << 4)) - ml


def _q6_k(block: Any, line: Any) -> None:
    d = _half(block, 208)
    for j in range(16):
        dl = d * float32(int8(block[192 + j]))
        at, shift = (j >> 3) * 64 + (j & 3) * 16, ((j >> 2) & 1) * 4
        codes, part = block[at : at + 16], line[16 * j : 16 * j + 16]
        at, pair = 128 + (j >> 3) * 32 + (j & 1) * 16, ((j >> 1) & 3) * 2
        high = block[at : at + 16]
        for i in range(16):
            part[i] = dl * float32((((codes[i] >> shift) & 15) | (((high[i] >> pair) & 3) << 4)) - 32)


def _iq4_nl(block: Any, line: Any) -> None:
    d = _half(block, 0)
    for i in range(16):
        line[i] = d * LEVELS[block[2 + i] & 15]
    for i in range(16):
        line[16 + i] = d * LEVELS[block[2 + i] >> 4]


def _iq4_xs(block: Any, line: Any) -> None:
    d = _half(block, 0)
    for j in range(8):
        low = (block[4 + (j >> 1)] >> ((j & 1) * 4)) & 15
        high = (block[2 + (j >> 2)] >> ((j & 3) * 2)) & 3
        dl = d * float32((low | (high << 4)) - 32)
        codes, part = block[8 + j * 16 : 24 + j * 16], line[32 * j : 32 * j + 32]
        for i in range(16):
            part[i] = dl * LEVELS[codes[i] & 15]
        for i in range(16):
            part[16 + i] = dl * LEVELS[codes[i] >> 4]


def _to_q8_0(line: Any, block: Any) -> Any:
    """Codes are rounded with ties away from zero. Gives 1 where a value or the scale is not finite."""
    largest, strange = float32(0), float32(0)
    for i in range(32):
        largest = max(largest, abs(line[i]))
        strange += line[i] - line[i]  # 0, but for NaN and Inf
    d = largest / float32(127) + strange
    inverse = float32(1) / d if d != float32(0) else float32(0)
    bits = store_F16(d)
    block[0], block[1] = uint8(bits & 255), uint8(bits >> 8)
    for i in range(32):
        scaled = line[i] * inverse
        whole = np.floor(abs(scaled))
        whole += np.floor(float32(2) * (abs(scaled) - whole))
        block[2 + i] = uint8(int8(whole if scaled >= float32(0) else -whole))
    return 1 if (bits & 0x7C00) == 0x7C00 else 0


@dataclass(frozen=True)
class BlockType:
    """``elements`` per block, which takes ``size`` bytes."""

    elements: int
    size: int
    unpack: Callable[[Any, Any], None]
    pack: Callable[[Any, Any], Any] | None = None


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, _q4_0), "Q4_1": BlockType(32, 20, _q4_1), "Q5_0": BlockType(32, 22, _q5_0),
    "Q5_1": BlockType(32, 24, _q5_1), "Q8_0": BlockType(32, 34, _q8_0, _to_q8_0), "Q2_K": BlockType(256, 84, _q2_k),
    "Q3_K": BlockType(256, 110, _q3_k), "Q4_K": BlockType(256, 144, _q4_k), "Q5_K": BlockType(256, 176, _q5_k),
    "Q6_K": BlockType(256, 210, _q6_k), "IQ4_NL": BlockType(32, 18, _iq4_nl), "IQ4_XS": BlockType(256, 136, _iq4_xs),
}  # fmt: skip


def unpack(kind: str, blocks: npt.NDArray[np.uint8], out: npt.NDArray[np.float32]) -> None:
    """Fill ``out`` with the values of whole ``blocks`` (both 1-D, contiguous)."""
    _unpacker(kind)(blocks, out)


def pack(kind: str, values: npt.NDArray[np.float32], blocks: npt.NDArray[np.uint8]) -> bool:
    """Fill ``blocks`` with ``values``, whole blocks of them; False where a value or a scale (float16) is not finite."""
    return _packer(kind)(values, blocks)[0] == 0


@cache
def _unpacker(kind: str) -> Kernel:
    block = BLOCK_TYPES[kind]
    return _compiled(block.unpack, _UNPACK, block, (("blocks", "[uint8]"), ("out", "[float32]")))


@cache
def _packer(kind: str) -> Kernel:
    block = BLOCK_TYPES[kind]
    assert block.pack is not None
    return _compiled(block.pack, _PACK, block, (("values", "[float32]"), ("blocks", "[uint8]")))


def _compiled(
    function: Callable[..., Any], loop: str, block: BlockType, parameters: tuple[tuple[str, str], ...]
) -> Kernel:
    functions = [f"@njit(**FAST)\n{inspect.getsource(part)}" for part in (_half, _scale, _offset, function)]
    run = loop.format(name=function.__name__, elements=block.elements, size=block.size)
    return load(Generated("\n\n".join((_HEAD, *functions, run)) + "\n", parameters, ()))

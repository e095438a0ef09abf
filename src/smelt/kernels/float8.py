"""float32 to FP8 (E4M3) with scales: the scale of a block from its largest magnitude, and the codes.

    scale = largest / 448,   code = the E4M3 number nearest to value / scale, ties to even, at most 448 in magnitude

each operation in float32, as DeepSeek-V3 (https://huggingface.co/deepseek-ai/DeepSeek-V3) and compressed-tensors
have it. A block of zeros has the scale 1.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .generate import Generated
from .native import Kernel, load

if TYPE_CHECKING:
    from .scalars import bits32_of, float32_of

float32, uint8, uint32 = np.float32, np.uint8, np.uint32

#: The largest number of E4M3.
LARGEST = np.float32(448)

_HEAD = """from typing import Any

from numba import njit
from numpy import float32, uint8, uint32
from smelt.kernels.scalars import FAST, bits32_of, float32_of"""

_LARGEST = """@njit(**FAST)
def run(values, columns, best, result):
    for start in range(0, values.shape[0], columns):
        _larger(values[start : min(start + columns, values.shape[0])], best)"""

_ENCODE = """@njit(**FAST)
def run(values, scales, columns, size, codes, result):
    beyond, strange = 0, 0
    for start in range(0, values.shape[0], columns):
        end = min(start + columns, values.shape[0])
        for first in range(start, end, size):
            last = min(first + size, end)
            found = _codes(values[first:last], scales[(first - start) // size], codes[first:last])
            beyond += found[0]
            strange += found[1]
    result[0], result[1] = beyond, strange"""


def _e4m3(value: Any) -> Any:
    """The code of a float32 within +-464: normal numbers by integer rounding, small ones by adding 2^14."""
    bits = bits32_of(value)
    magnitude = bits & uint32(0x7FFFFFFF)
    normal = (magnitude + uint32(0xC407FFFF) + ((magnitude >> uint32(20)) & uint32(1))) >> uint32(20)
    small = bits32_of(float32_of(magnitude) + float32(16384)) - uint32(0x46800000)
    rounded = small if magnitude < uint32(0x3C800000) else normal
    return uint8(rounded | ((bits >> uint32(24)) & uint32(0x80)))


def _larger(values: Any, best: Any) -> None:
    for i in range(values.shape[0]):
        best[i] = max(best[i], bits32_of(values[i]) & uint32(0x7FFFFFFF))


def _codes(values: Any, scale: Any, codes: Any) -> Any:
    """Returns how many values lie beyond the largest code by more than rounding allows, and how many are no numbers."""
    beyond, strange = 0, 0
    for i in range(values.shape[0]):
        scaled = values[i] / scale
        beyond += 1 if abs(scaled) > float32(464) else 0
        strange += 1 if (bits32_of(values[i]) & uint32(0x7F800000)) == uint32(0x7F800000) else 0
        codes[i] = _e4m3(min(max(scaled, float32(-448)), float32(448)))
    return beyond, strange


def largest(values: npt.NDArray[np.float32], columns: int, size: int) -> npt.NDArray[np.float32]:
    """The largest magnitude of each stretch of ``size`` columns of a matrix (flat; its last row may be cut short)."""
    best = np.zeros(columns, np.uint32)
    _kernel(_LARGEST, (_larger,), (("values", "[float32]"), ("columns", "int64"), ("best", "[uint32]")))(
        values, columns, best
    )
    return np.maximum.reduceat(best, np.arange(0, columns, size)).view(np.float32)


def scales_of(magnitudes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Largest magnitudes to scales, never 0."""
    scales = magnitudes / LARGEST
    return np.where(scales > 0, scales, np.float32(1))


def encode(
    values: npt.NDArray[np.float32], scales: npt.NDArray[np.float32], columns: int, size: int,
    codes: npt.NDArray[np.uint8],
) -> tuple[int, int]:  # fmt: skip
    """Fill ``codes`` for ``values``, rows of a matrix (flat) whose stretches of ``size`` columns have these ``scales``.

    Returns how many values the scales are too small for, which become the largest code, and how many are NaN or Inf.
    """
    parameters = (("values", "[float32]"), ("scales", "[float32]"), ("columns", "int64"), ("size", "int64"),
                  ("codes", "[uint8]"))  # fmt: skip
    return _kernel(_ENCODE, (_e4m3, _codes), parameters)(values, scales, columns, size, codes)


@cache
def _kernel(loop: str, functions: tuple[Any, ...], parameters: tuple[tuple[str, str], ...]) -> Kernel:
    parts = [f"@njit(**FAST)\n{inspect.getsource(part)}" for part in functions]
    return load(Generated("\n\n".join((_HEAD, *parts, loop)) + "\n", parameters, ()))

"""The order of the eight codes in a word of AWQ."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy.typing as npt

from .generate import Generated
from .native import Kernel, load

#: A perfect shuffle: two exchanges of bits with those some places above them.
_TEXT = """from numba import njit
from numpy import uint32
from smelt.kernels.scalars import FAST

@njit(**FAST)
def swapped(word, shift, mask):
    held = uint32(uint32(word ^ uint32(word >> shift)) & mask)
    return uint32(word ^ held ^ uint32(held << shift))

@njit(**FAST)
def run(words, result):
    for i in range(words.shape[0]):
        words[i] = swapped(swapped(words[i], uint32(8), uint32(0x0000FF00)), uint32(4), uint32(0x00F000F0))
"""


def in_order(words: npt.NDArray[Any]) -> None:
    """Bring nibbles 0 4 1 5 2 6 3 7 of every word (uint32, 1-D, contiguous) into the order of columns, in place."""
    _kernel()(words)


@cache
def _kernel() -> Kernel:
    return load(Generated(_TEXT, (("words", "[uint32]"),), ()))

"""16-bit floats to float32, exactly: numpy's own conversion of float16 goes one by one."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .generate import Generated
from .native import Kernel, load

_TEXT = """from numba import njit
from smelt.kernels.scalars import FAST, load_{dtype}

@njit(**FAST)
def run(stored, out, result):
    for i in range(out.shape[0]):
        out[i] = load_{dtype}(stored[i])
"""


def widen(stored: npt.NDArray[Any], dtype: str, out: npt.NDArray[np.float32]) -> None:
    """Fill ``out`` with the values of ``stored``: bits (uint16) of BF16 or F16; both 1-D, contiguous, of one length."""
    _kernel(dtype)(stored, out)


@cache
def _kernel(dtype: str) -> Kernel:
    return load(Generated(_TEXT.format(dtype=dtype), (("stored", "[uint16]"), ("out", "[float32]")), ()))

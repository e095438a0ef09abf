"""The words that element formulas are written in, beside ``+ - * /``, comparisons and ``abs``.

A formula is an ordinary function of numbers. Called on numpy arrays or torch tensors these words work on
whole arrays (and under autograd); compiled by :mod:`smelt.kernels.compile` the same words are scalar
operations inside one fused loop. Each word is defined so that all three give the same bits: only
correctly rounded operations and selections, no ``exp``, no ``tanh``, no fused multiply-add.
"""

from __future__ import annotations

from typing import Any


def where(condition: Any, yes: Any, no: Any) -> Any:
    """``yes`` where ``condition`` holds, else ``no``: a selection, never an arithmetic blend."""
    if _is_torch(condition):
        import torch

        return torch.where(condition, yes, no)
    import numpy as np

    return np.where(condition, yes, no)


def sqrt(x: Any) -> Any:
    """The correctly rounded square root.

    torch's own on the CPU is not (it errs by one unit in the last place for one float32 in six), so it is
    taken in double and rounded; torch's double square root may itself be off by one unit.
    """
    if _is_torch(x):
        return x.double().sqrt().to(x.dtype)
    import numpy as np

    return np.sqrt(x)


def minimum(a: Any, b: Any) -> Any:
    """The smaller value; ``a`` where neither is smaller, NaN where either is NaN."""
    return where(b < a, b, where(a <= b, a, a + b))


def maximum(a: Any, b: Any) -> Any:
    """The larger value; ``a`` where neither is larger, NaN where either is NaN."""
    return where(b > a, b, where(a >= b, a, a + b))


def sign(x: Any) -> Any:
    """-1, 0 or 1; 0 for NaN and for both zeros."""
    return where(x > 0, 1, where(x < 0, -1, 0))


def _is_torch(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"


#: The words by name; the compiler resolves a formula's free names here before it looks further.
WORDS = {word.__name__: word for word in (where, sqrt, minimum, maximum, sign)}

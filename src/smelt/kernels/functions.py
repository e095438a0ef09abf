"""exp and tanh for element formulas, made of the words of the vocabulary: the same bits wherever they are computed."""

from __future__ import annotations

from typing import Any

from .vocabulary import maximum, where


def exp_of_negative(x: Any) -> Any:
    """e to the power of x for x <= 0, within a few units in the last place of float32; below -87 that of -87.

    log 2 is taken off 64, 32, ..., 1 times, each time in two parts of which the first is exact; a Taylor series
    does the rest, between -log 2 and 0. Written out, because a loop over constants is not vectorised.
    """
    x = maximum(x, -87)
    power = where(x <= -44.375, 5.421010862427522e-20, 1)
    x = where(x <= -44.375, (x + 44.375) - 0.013580444163500202, x)
    power = where(x <= -22.1875, 2.3283064365386963e-10 * power, power)
    x = where(x <= -22.1875, (x + 22.1875) - 0.006790222081750101, x)
    power = where(x <= -11.09375, 1.52587890625e-05 * power, power)
    x = where(x <= -11.09375, (x + 11.09375) - 0.0033951110408750503, x)
    power = where(x <= -5.546875, 0.00390625 * power, power)
    x = where(x <= -5.546875, (x + 5.546875) - 0.0016975555204375252, x)
    power = where(x <= -2.7734375, 0.0625 * power, power)
    x = where(x <= -2.7734375, (x + 2.7734375) - 0.0008487777602187623, x)
    power = where(x <= -1.38671875, 0.25 * power, power)
    x = where(x <= -1.38671875, (x + 1.38671875) - 0.00042438888010938114, x)
    power = where(x <= -0.693359375, 0.5 * power, power)
    x = where(x <= -0.693359375, (x + 0.693359375) - 0.00021219444005469057, x)
    tail = 1 + x * 0.16666666666666666 * (1 + x * 0.14285714285714285 * (1 + x * 0.125 * (1 + x * 0.1111111111111111)))
    return power * (1 + x * (1 + x * 0.5 * (1 + x * 0.3333333333333333 * (1 + x * 0.25 * (1 + x * 0.2 * tail)))))


def tanh_of_small(x: Any) -> Any:
    """tanh for |x| <= 1: the continued fraction, within a few units in the last place of float32."""
    square = x * x
    return x / (1 + square / (3 + square / (5 + square / (7 + square / (9 + square * 0.09090909090909091)))))


def tanh(x: Any) -> Any:
    """tanh everywhere: small arguments keep their relative precision."""
    fall = exp_of_negative(-2 * abs(x))
    far = (1 - fall) / (1 + fall)
    return where(abs(x) < 1, tanh_of_small(where(abs(x) < 1, x, 0)), where(x < 0, -far, far))

"""exp and tanh for element formulas, made of the words of the vocabulary: the same bits wherever they are computed."""

from __future__ import annotations

from typing import Any

from .vocabulary import maximum, sign, where


def exp_of_negative(x: Any) -> Any:
    """e to the power of x for x <= 0, within a few units in the last place of float32; below -87 that of -87.

    Powers of two are taken off one binary digit of the exponent at a time, each subtracted in two parts of which
    the first is exact; a Taylor series does the rest, between -log 2 and 0.
    """
    rest = maximum(x, -87)
    power = 1 + 0 * rest
    for factor, high, low in zip(  # noqa: B905
        (5.421010862427522e-20, 2.3283064365386963e-10, 1.52587890625e-05, 0.00390625, 0.0625, 0.25, 0.5),
        (44.375, 22.1875, 11.09375, 5.546875, 2.7734375, 1.38671875, 0.693359375),
        (-0.013580444163500197, -0.006790222081750098, -0.003395111040875049, -0.0016975555204375246,
         -0.0008487777602187623, -0.00042438888010938114, -0.00021219444005469057),
    ):  # fmt: skip
        power = where(rest <= -high, factor * power, power)
        rest = where(rest <= -high, (rest + high) + low, rest)
    series = 1 + 0 * rest
    for reciprocal in (
        0.08333333333333333, 0.09090909090909091, 0.1, 0.1111111111111111, 0.125, 0.14285714285714285,
        0.16666666666666666, 0.2, 0.25, 0.3333333333333333, 0.5, 1,
    ):  # fmt: skip
        series = 1 + reciprocal * rest * series
    return power * series


def tanh_of_small(x: Any) -> Any:
    """tanh for |x| <= 1: the continued fraction, within a few units in the last place of float32."""
    square = x * x
    return x / (1 + square / (3 + square / (5 + square / (7 + square / (9 + square * 0.09090909090909091)))))


def tanh(x: Any) -> Any:
    """tanh everywhere: small arguments keep their relative precision."""
    fall = exp_of_negative(-2 * abs(x))
    return where(abs(x) < 1, tanh_of_small(where(abs(x) < 1, x, 0)), sign(x) * ((1 - fall) / (1 + fall)))

"""Gradient descent on a matrix, step by step (Adam) or all steps at once (on a quadratic form).

Adam: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, https://arxiv.org/abs/1412.6980, without
weight decay. What is descended on is the way from the start, which is short: where the gradient at the start is exact,
one in fp32 of the way adds a rounding to what is small already, at half the time. The way itself is added up in fp64.
All in a fixed order: the result depends on the inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Single = npt.NDArray[np.float32]

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8

#: Elements of a strip.
_STRIP = 1 << 15


def adam(gradient: Callable[[Single], Single], shape: tuple[int, ...], rate: float, steps: int) -> Matrix:
    """The way (m, n) that ``steps`` steps of size ``rate`` lead from the start.

    ``gradient`` is given the way so far, and gives an array of its own.
    """
    way, seen = np.zeros(shape), np.zeros(shape, np.float32)
    mean, square = np.zeros_like(seen), np.zeros_like(seen)
    parts = strips(shape)
    for step in range(1, steps + 1):
        slope = gradient(seen)
        for part in parts:
            _step(mean[part], square[part], slope[part], rate, step)
            way[part] -= slope[part]
            seen[part] = way[part]
    return way


def strips(shape: tuple[int, ...]) -> list[slice]:
    """Rows that fit into a core's cache together, so that arithmetic on them does not wait for memory."""
    rows = max(1, _STRIP // max(1, shape[1]))
    return [slice(first, first + rows) for first in range(0, shape[0], rows)]


def _step(mean: Single, square: Single, slope: Single, rate: float, step: int) -> None:
    """One step, which takes the place of the slope."""
    mean *= _BETAS[0]
    mean += (1 - _BETAS[0]) * slope
    square *= _BETAS[1]
    slope *= slope
    slope *= 1 - _BETAS[1]
    square += slope
    np.sqrt(square, out=slope)
    slope /= sqrt(1 - _BETAS[1] ** step)
    slope += _EPSILON
    np.divide(mean, slope, out=slope)
    slope *= rate / (1 - _BETAS[0] ** step)


def momentum_share(curvatures: Matrix, rate: float, momentum: float, steps: int) -> Matrix:
    """How much of the way to the minimum gradient descent with momentum has gone after ``steps`` steps.

    ``curvatures`` are the second derivatives of a quadratic form along its own axes; a share of 1 is the minimum.
    Along each axis the distance left, a, follows u <- momentum u + curvature a, a <- a - rate u.
    """
    left, speed = np.ones_like(curvatures), np.zeros_like(curvatures)
    for _ in range(steps):
        speed = momentum * speed + curvatures * left
        left = left - rate * speed
    return 1 - left

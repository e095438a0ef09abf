"""Gradient descent on a matrix, step by step (Adam) or all steps at once (on a quadratic form).

Adam: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, https://arxiv.org/abs/1412.6980, without
weight decay. In fp64 and in a fixed order: the result depends on the inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8

#: Elements of a strip.
_STRIP = 1 << 14


def adam(start: Matrix, gradient: Callable[[Matrix], Matrix], rate: float, steps: int) -> Matrix:
    """Where ``steps`` steps of size ``rate`` lead from ``start``; ``gradient`` gives an array of its own."""
    place, mean, square = start.copy(), np.zeros_like(start), np.zeros_like(start)
    parts = strips(start.shape)
    for step in range(1, steps + 1):
        slope = gradient(place)
        for part in parts:
            _step(place[part], mean[part], square[part], slope[part], rate, step)
    return place


def strips(shape: tuple[int, ...]) -> list[slice]:
    """Rows that fit into a core's cache together, so that arithmetic on them does not wait for memory."""
    rows = max(1, _STRIP // max(1, shape[1]))
    return [slice(first, first + rows) for first in range(0, shape[0], rows)]


def _step(place: Matrix, mean: Matrix, square: Matrix, slope: Matrix, rate: float, step: int) -> None:
    """One step, in place; ``slope`` is used up."""
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
    place -= slope


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

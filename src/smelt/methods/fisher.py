"""Fisher-weighted averaging with given diagonal Fisher statistics.

Matena, Raffel, "Merging models with Fisher-weighted averaging", NeurIPS 2022,
https://arxiv.org/abs/2111.09832, equation 1, here in the form of the MergeLM code (the paper's own flavour
comes with the collection of the statistic):

    theta = sum_j c_j (F_j + minimal) theta_j / sum_j c_j (F_j + minimal)

With ``normalize`` the coefficient of each model is multiplied by q_j / sum q, q_j = 1 / (||F_j||_2 + minimal),
the norm taken over all merged tensors.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

from ..kernels.program import Totals, call
from .registry import Steps
from .tensors import Tensor


def square(x: Any) -> Any:
    return (x * x,)


def normalised(tensors: tuple[Tensor, ...], coefficients: tuple[float, ...], minimal: float) -> Steps:
    """The coefficients times each model's share of 1 / (||F_j|| + minimal)."""
    squares = yield tuple(
        Totals(tuple(call(square, x=tensor.statistics["fisher"][index]) for tensor in tensors))
        for index in range(len(coefficients))
    )
    inverse = [1.0 / (sqrt(total) + minimal) for (total,) in squares]
    return tuple(c * q / sum(inverse) for c, q in zip(coefficients, inverse, strict=True))

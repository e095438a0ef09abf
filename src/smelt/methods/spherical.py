"""What the methods on the sphere share: products of the models, the arc between two, and their combination.

The x_i are whole tensors taken as vectors; with a base they are the task vectors theta_i - theta_0. Every
norm, angle and tangent of these methods is decided by the Gram matrix <x_i, x_j>, which one pass finds in
fp64, and the output is base + sum_i c_i x_i. What iterates, iterates on the coefficients.

An error of 1e-15 in a cosine, which sums have, is one of 1e-15 / angle in the angle, but no more than 1e-15 in
the factors of an arc: they tend to 1 - t and t with the square of the angle. So a small angle costs nothing.
Near opposite vectors factors grow as 1 / sine and what they multiply cancels, in fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.program import Call, Each, Gram, Operand, call
from .linear import weighted_sum
from .task_arithmetic import add_task_vectors
from .tensors import Tensor, delta, identity

Floats = npt.NDArray[np.float64]

#: The least sine of an angle near 180 degrees: below it fp32 keeps less than three digits of the arc.
_OPPOSITE = 1e-4


# --- products -------------------------------------------------------------------------------------------


def products(models: tuple[Operand, ...], base: Operand | None = None) -> Gram:
    """The request for the Gram matrix of the models, or of their task vectors."""
    if base is None:
        return Gram((call(identity, x=Each(models)),))
    return Gram((call(delta, base=base, model=Each(models)),))


def vectors(tensor: Tensor) -> dict[str, Any]:
    """The arguments of the functions below, for a request of rows."""
    return {"models": tensor.models} if tensor.base is None else {"models": tensor.models, "base": tensor.base}


def row_products(models: tuple[Any, ...], base: Any = None) -> Floats:
    """The Gram matrix of each row: (rows, n, n) from n arrays (rows, length)."""
    return _products(models, base, axis=1)


def column_products(models: tuple[Any, ...], base: Any = None) -> Floats:
    """The Gram matrix of each column: (columns, n, n) from n arrays (rows, columns)."""
    return _products(models, base, axis=0)


def _products(models: tuple[Any, ...], base: Any, axis: int) -> Floats:
    x = models if base is None else tuple(delta(base, model) for model in models)
    out = np.empty((x[0].shape[1 - axis], len(x), len(x)))
    for i, j in zip(*np.triu_indices(len(x)), strict=True):
        out[:, i, j] = out[:, j, i] = np.multiply(x[i], x[j], dtype=np.float64).sum(axis=axis)
    return out


def norms_of(grams: Floats) -> Floats:
    """|x_i|: (..., n) from (..., n, n)."""
    return np.asarray(np.sqrt(np.diagonal(grams, axis1=-2, axis2=-1)))


# --- the arc --------------------------------------------------------------------------------------------


def arc(cosine: Any, t: float) -> tuple[Floats, Floats]:
    """The factors of two vectors at share ``t`` of the arc between them, for each of some cosines.

    sin((1 - t) angle) / sin(angle) and sin(t angle) / sin(angle); 1 - t and t where there is no arc: equal or
    opposite directions, and where the cosine is not a number.
    """
    cosine = np.clip(cosine, -1.0, 1.0)
    angle, sine = np.arccos(cosine), sine_of(cosine)
    bent = sine > np.where(cosine < 0, _OPPOSITE, 0)
    first, second = (np.where(bent, np.sin(s * angle) / np.where(bent, sine, 1), s) for s in (1 - t, t))
    return first, second


def sine_of(cosine: Any) -> Any:
    """The sine of an angle between 0 and 180 degrees, without cancellation."""
    return np.sqrt((1 - cosine) * (1 + cosine))


# --- the output -----------------------------------------------------------------------------------------


def combined(models: tuple[Operand, ...], factors: tuple[Any, ...], base: Operand | None = None) -> Call:
    """base + sum_i c_i x_i, each factor a number or an operand."""
    if base is None:
        return call(weighted_sum, models=models, weights=factors)
    return call(add_task_vectors, base=base, models=models, weights=factors, scale=1.0)

"""The best approximation of a difference by a matrix of low rank, and what it leaves out.

Eckart and Young (1936): the first r singular triplets. They come from the eigenvectors of the Gram matrix of
the short side, in fp64, and one product with the difference:

    G = D^T D = V diag(s^2) V^T,    P = D V_r,    s_i = |P_i|,    D_r = P V_r^T

so nothing is divided by a small singular value, and ``D_r`` is an exact projection of ``D`` whatever the error
of V. Directions below 1e-6 or so of the largest are lost in G and left out; their share of ``|D|^2`` is
below 1e-12. A strip is always as long, so that the bits depend on the two matrices alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.dtypes import rounded

Array = npt.NDArray[Any]
Matrix = npt.NDArray[np.float64]
Shape = tuple[int, int]

_STRIP = 2048

#: The root mean square of spacing / |w| of a binary float, in units of its epsilon, for mantissas as weights
#: have them (uniform logarithms), over sqrt(12) as rounding errors are uniform; and half as much again, since
#: single matrices exceed what is expected of them.
_ROUNDING = 1.5 * 0.7355 / sqrt(12)


@dataclass(frozen=True)
class Limits:
    """At most ``rank`` directions; of these, as few as leave ``error`` (relative), and only singular values above
    ``sv_epsilon``."""

    rank: int
    error: float | None = None
    sv_epsilon: float = 0.0


def subtracted(model: Array, base: Array) -> Matrix:
    """``model - base`` of stored values: in fp32 unless one of them is fp64."""
    wide = np.float64 if np.float64 in (model.dtype, base.dtype) else np.float32
    return np.asarray(model.astype(wide) - base.astype(wide), np.float64)


class Difference:
    """``model - base`` of two matrices of stored values, made strip by strip along the long side."""

    def __init__(self, model: Array, base: Array) -> None:
        self.shape: Shape = model.shape[0], model.shape[1]
        self.tall = self.shape[0] >= self.shape[1]
        self._model, self._base = (model, base) if self.tall else (model.T, base.T)

    def strips(self) -> Iterator[tuple[slice, Matrix]]:
        """(where on the long side, the strip with the short side as its columns)."""
        for part in self._parts():
            yield part, subtracted(self._model[part], self._base[part])

    def rounding(self) -> float:
        """About the largest singular value that rounding the model's weights to their dtype makes."""
        parts = (self._model[part].astype(np.float64) for part in self._parts())
        square = sum(float((part * part).sum()) for part in parts) / max(1, self._model.size)
        sigma = _ROUNDING * _epsilon(self._model.dtype) * sqrt(square)
        return sigma * (sqrt(self.shape[0]) + sqrt(self.shape[1]))

    def _parts(self) -> Iterator[slice]:
        return (slice(start, start + _STRIP) for start in range(0, max(self.shape), _STRIP))


def _epsilon(dtype: np.dtype[Any]) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype).eps)


@dataclass(frozen=True)
class LowRank:
    """``left diag(sigma) right``: unit columns (m, r), singular values (r,), unit rows (r, n).

    ``norm`` is the Frobenius norm of the difference, ``spectrum`` all its singular values, largest first.
    """

    left: Matrix
    sigma: Matrix
    right: Matrix
    norm: float
    spectrum: Matrix

    @property
    def rank(self) -> int:
        return len(self.sigma)

    @property
    def transposed(self) -> LowRank:
        return LowRank(self.right.T, self.sigma, self.left.T, self.norm, self.spectrum)


def low_rank(difference: Difference, limits: Limits) -> LowRank:
    """The approximation of the smallest rank within ``limits``; rank 0 where the difference is zero.

    The sign of each direction is such that the largest component of its short side is positive.
    """
    short = min(difference.shape)
    gram = np.zeros((short, short))
    for _, strip in difference.strips():
        gram += strip.T @ strip
    values, vectors = np.linalg.eigh(gram)
    squares = np.maximum(values[::-1], 0.0)
    lost = float(squares[0]) * np.finfo(np.float64).eps * max(difference.shape)
    basis = vectors[:, ::-1][:, : rank_within(limits, squares, lost)]
    basis = basis * signs(basis)
    projected = np.concatenate([strip @ basis for _, strip in difference.strips()])
    sigma = np.sqrt((projected * projected).sum(axis=0))
    found = LowRank(projected / sigma, sigma, basis.T, sqrt(float(np.trace(gram))), np.sqrt(squares))
    return found if difference.tall else found.transposed


def signs(basis: Matrix) -> Matrix:
    """1 or -1 for each column (k,): times it, the component that is largest in magnitude is positive."""
    return np.where(basis[np.abs(basis).argmax(axis=0), np.arange(basis.shape[1])] < 0, -1.0, 1.0)


def rank_within(limits: Limits, squares: Matrix, lost: float) -> int:
    """How many directions, from the squares of all singular values; up to ``lost`` they are rounding."""
    count = int(((squares > lost) & (np.sqrt(squares) > limits.sv_epsilon)).sum())
    if limits.error is not None:
        left_out = np.append(np.cumsum(squares[::-1])[::-1], 0.0)  # squared norm beyond rank 0, 1, ...
        count = min(count, int((left_out > limits.error**2 * left_out[0]).sum()))
    return min(count, limits.rank)


def factors(found: LowRank, distribute: bool, dtype: str) -> tuple[Array, Array]:
    """B (m, r) and A (r, n) with B A the approximation, rounded to ``dtype`` (a safetensors code).

    ``distribute``: both carry the square root of the singular values; else A carries them whole.
    """
    root = np.sqrt(found.sigma)
    outer, inner = (root, root) if distribute else (np.ones_like(root), found.sigma)
    return rounded(found.left * outer, dtype), rounded(inner[:, None] * found.right, dtype)


def residual(difference: Difference, left: Array, right: Array) -> float:
    """``|difference - left right|`` (Frobenius), measured with the factors as they are stored."""
    wide = (left, right) if difference.tall else (right.T, left.T)
    long, short = (factor.astype(np.float64) for factor in wide)
    total = 0.0
    for part, strip in difference.strips():
        rest = strip - long[part] @ short
        total += float((rest * rest).sum())
    return sqrt(total)

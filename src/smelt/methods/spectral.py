"""Singular vectors, polar factors and what is made of them, for methods on matrices: numpy, fp64, one call each.

A decomposition comes from the Gram matrix of the short side (an eigenproblem: a third of an SVD's time), whose
error grows with the square of the condition number; where that is large, from an SVD in fp64. Singular values up
to ``tolerance`` times the largest, and never less than rounding makes of them, count as zero: their vectors
are arbitrary, so that no function here returns them. What is returned through :class:`Triplets` is defined up to
signs, and rotations inside equal singular values; use it in forms that do not depend on these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

#: Below this share of the largest eigenvalue of a Gram matrix its eigenvectors lose more than five digits.
_SAFE = 1e-10


@dataclass(frozen=True)
class Triplets:
    """``left diag(sigma) right^T``: orthonormal columns (m, k) and (n, k), values (k,), the largest first."""

    left: Matrix
    sigma: Matrix
    right: Matrix

    @property
    def rank(self) -> int:
        return len(self.sigma)

    def matrix(self) -> Matrix:
        """The (m, n) matrix."""
        return (self.left * self.sigma) @ self.right.T

    def first(self, count: int) -> Triplets:
        """The ``count`` triplets with the largest values."""
        return Triplets(self.left[:, :count], self.sigma[:count], self.right[:, :count])

    def scaled(self, factor: float) -> Triplets:
        """Those of ``factor`` times the matrix; a negative factor makes the values negative."""
        return Triplets(self.left, factor * self.sigma, self.right)


def triplets(matrix: npt.NDArray[Any], count: int | None = None, tolerance: float = 0.0, size: float = 0.0) -> Triplets:
    """The largest ``count`` singular triplets of a matrix (m, n), all by default; fewer where its rank is less.

    ``size``: the norm of what the matrix was computed from, where that is larger; rounding counts from there.
    """
    given = np.asarray(matrix, np.float64)
    tall = given if given.shape[0] >= given.shape[1] else given.T
    count = tall.shape[1] if count is None else min(count, tall.shape[1])
    if not count or not given.any():
        return Triplets(given[:, :0], np.zeros(0), given.T[:, :0])
    found = _by_gram(tall, count) or _by_svd(tall, count)
    floor = _floor(tall.shape, tolerance) * max(size, float(found.sigma[0]))
    found = found.first(int((found.sigma > floor).sum()))
    return found if tall is given else Triplets(found.right, found.sigma, found.left)


def polar(matrix: npt.NDArray[Any], tolerance: float = 0.0) -> Matrix:
    """The partial isometry Q (m, n) of the polar decomposition: the sum of u_i v_i^T over the numerical range.

    Of full rank it is the nearest matrix with orthonormal columns (rows where it is wide).
    """
    return spectrum_and_polar(matrix, tolerance)[1]


def spectrum_and_polar(matrix: npt.NDArray[Any], tolerance: float = 0.0) -> tuple[Matrix, Matrix]:
    """The singular values that count, the largest first, and the polar factor."""
    given = np.asarray(matrix, np.float64)
    if given.shape[0] < given.shape[1]:
        sigma, turned = spectrum_and_polar(given.T, tolerance)
        return sigma, turned.T
    values, vectors = np.linalg.eigh(given.T @ given) if given.size else (np.zeros(0), given.T)
    if values.size and values[0] > max(_SAFE, tolerance * tolerance) * values[-1]:
        roots = np.sqrt(values)
        return roots[::-1], given @ ((vectors / roots) @ vectors.T)
    found = triplets(given, tolerance=tolerance)
    return found.sigma, found.left @ found.right.T


def combined(parts: Sequence[Triplets], orthogonal: bool) -> Triplets:
    """All triplets side by side; ``orthogonal``: with the polar factors of the joint vectors in their place."""
    left, right = (np.concatenate([getattr(part, side) for part in parts], axis=1) for side in ("left", "right"))
    sigma = np.concatenate([part.sigma for part in parts])
    if orthogonal and len(parts) > 1:
        left, right = polar(left), polar(right)
    return Triplets(left, sigma, right)


def _by_gram(tall: Matrix, count: int) -> Triplets | None:
    """None where the smallest wanted value is lost in the Gram matrix."""
    values, vectors = np.linalg.eigh(tall.T @ tall)
    if values[-count] <= _SAFE * values[-1]:
        return None
    right = vectors[:, ::-1][:, :count]
    left = tall @ right
    sigma = np.sqrt((left * left).sum(axis=0))
    return Triplets(left / sigma, sigma, right)


def _by_svd(tall: Matrix, count: int) -> Triplets:
    left, sigma, right = np.linalg.svd(tall, full_matrices=False)
    return Triplets(left, sigma, right.T).first(count)


def _floor(shape: tuple[int, ...], tolerance: float) -> float:
    """The share of the largest singular value up to which one counts as zero."""
    return max(tolerance, 10 * max(shape) * float(np.finfo(np.float64).eps))

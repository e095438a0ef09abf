"""Singular vectors, polar factors and what is made of them, for methods on matrices: numpy, fp64, one call each.

A decomposition comes from the Gram matrix of the short side (an eigenproblem: a third of an SVD's time), whose
error grows with the square of the condition number; where that is large, from an SVD in fp64. Singular values up
to ``tolerance`` times the largest, and never less than rounding makes of them, count as zero: their vectors
are arbitrary, so that no function here returns them. What is returned through :class:`Triplets` is defined up to
signs, and rotations inside equal singular values; use it in forms that do not depend on these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

#: Below this share of the largest eigenvalue of a Gram matrix its eigenvectors lose more than five digits.
_SAFE = 1e-10

#: Rows put before a matrix to shift it in memory.
_PAD = 8


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


def eigenpairs(gram: Matrix) -> tuple[Matrix, Matrix]:
    """As ``numpy.linalg.eigh``, for a positive semi-definite matrix (n, n): values ascending, vectors in columns.

    Where rows lie a multiple of 4 KiB apart, which the caches bear badly (15 % of the time), a few rows of another
    matrix are put before them: they stay apart, and come first.
    """
    size = len(gram)
    if not size or size % 512:
        return np.linalg.eigh(gram)
    apart = np.zeros((size + _PAD, size + _PAD))
    apart[_PAD:, _PAD:] = gram
    np.fill_diagonal(apart[:_PAD, :_PAD], -1.0 - float(np.trace(gram)))
    values, vectors = np.linalg.eigh(apart)
    return values[_PAD:], vectors[_PAD:, _PAD:]


#: How many singular triplets: so many, or as many as a function says of all singular values, the largest first.
Count = int | Callable[[Matrix], int]


def triplets(
    matrix: npt.NDArray[Any], count: Count | None = None, tolerance: float = 0.0, size: float = 0.0
) -> Triplets:
    """The largest ``count`` singular triplets of a matrix (m, n), all by default; fewer where its rank is less.

    ``size``: the norm of what the matrix was computed from, where that is larger; rounding counts from there.
    """
    given = np.asarray(matrix, np.float64)
    tall = given if given.shape[0] >= given.shape[1] else given.T
    if count == 0 or not given.any():
        return Triplets(given[:, :0], np.zeros(0), given.T[:, :0])
    found = _by_gram(tall, count) or _by_svd(tall, count)
    floor = _floor(tall.shape, tolerance) * max(size, float(found.sigma.max(initial=0)))
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
    root = inverse_root(given, tolerance)
    if root is not None:
        return root.sigma, given @ root.matrix
    found = triplets(given, tolerance=tolerance)
    return found.sigma, found.left @ found.right.T


class InverseRoot(NamedTuple):
    """(A^T A)^-1/2 of a matrix A (m, n), m >= n, and the singular values of A, the largest first."""

    matrix: Matrix
    sigma: Matrix


def inverse_root(tall: Matrix, tolerance: float = 0.0) -> InverseRoot | None:
    """None where the smallest singular values of ``tall`` do not count, or are lost in its Gram matrix."""
    if not tall.size:
        return None
    values, vectors = eigenpairs(tall.T @ tall)
    if values[0] <= max(_SAFE, tolerance * tolerance) * values[-1]:
        return None
    vectors /= values**0.25
    return InverseRoot(vectors @ vectors.T, np.sqrt(values)[::-1])


def orthogonal_sum(parts: Sequence[Triplets]) -> Matrix:
    """The (m, n) matrix of all triplets side by side, their vectors replaced by the polar factors of the joint ones.

    U G_U^-1/2 S G_V^-1/2 V^T with G the Gram matrices of the joint vectors: nothing as long as these is made twice.
    """
    joint = combined(parts, orthogonal=False)
    if len(parts) == 1 or joint.rank > min(len(joint.left), len(joint.right)):
        return combined(parts, orthogonal=True).matrix()
    roots = inverse_root(joint.left), inverse_root(joint.right)
    if roots[0] is None or roots[1] is None:
        return combined(parts, orthogonal=True).matrix()
    middle = (roots[0].matrix * joint.sigma) @ roots[1].matrix
    if len(joint.left) <= len(joint.right):
        return np.asarray((joint.left @ middle) @ joint.right.T)
    return np.asarray(joint.left @ (middle @ joint.right.T))


def combined(parts: Sequence[Triplets], orthogonal: bool) -> Triplets:
    """All triplets side by side; ``orthogonal``: with the polar factors of the joint vectors in their place."""
    left, right = (np.concatenate([getattr(part, side) for part in parts], axis=1) for side in ("left", "right"))
    sigma = np.concatenate([part.sigma for part in parts])
    if orthogonal and len(parts) > 1:
        left, right = polar(left), polar(right)
    return Triplets(left, sigma, right)


def _counted(count: Count | None, sigma: Matrix) -> int:
    wanted = len(sigma) if count is None else count(sigma) if callable(count) else count
    return min(wanted, len(sigma))


def _by_gram(tall: Matrix, count: Count | None) -> Triplets | None:
    """None where the smallest wanted value is lost in the Gram matrix."""
    values, vectors = eigenpairs(tall.T @ tall)
    wanted = _counted(count, np.sqrt(np.maximum(values[::-1], 0)))
    if wanted and values[-wanted] <= _SAFE * values[-1]:
        return None
    right = vectors[:, ::-1][:, :wanted]
    left = tall @ right
    sigma = np.sqrt((left * left).sum(axis=0))
    return Triplets(left / sigma, sigma, right)


def _by_svd(tall: Matrix, count: Count | None) -> Triplets:
    left, sigma, right = np.linalg.svd(tall, full_matrices=False)
    return Triplets(left, sigma, right.T).first(_counted(count, sigma))


def _floor(shape: tuple[int, ...], tolerance: float) -> float:
    """The share of the largest singular value up to which one counts as zero."""
    return max(tolerance, 10 * max(shape) * float(np.finfo(np.float64).eps))

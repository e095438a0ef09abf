"""Singular vectors, polar factors and what is made of them, for methods on matrices: numpy, fp64, one call each.

A decomposition comes from the Gram matrix of the short side (an eigenproblem: a third of an SVD's time, less where few
vectors are wanted). There what
belongs to small singular values drowns in rounding, as the square of the condition number; where that matters it is
found again in the complement of the large ones, from the matrix itself, as exactly as an SVD has it. Singular values
up to ``tolerance`` times the largest, and never less than rounding makes of them, count as zero: their vectors
are arbitrary, so that no function here returns them. What is returned through :class:`Triplets` is defined up to
signs, and rotations inside equal singular values; use it in forms that do not depend on these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..kernels.lapack import eigenproblem, square

Matrix = npt.NDArray[np.float64]

#: Below this share of the largest eigenvalue of a Gram matrix its eigenvectors lose more than five digits,
_SAFE = 1e-10
#: and above this one they have ten.
_GOOD = 1e-6


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


@dataclass(frozen=True, eq=False)
class Strips:
    """A matrix (m, n), m >= n, in fp64, that is seen some rows at a time, as often as is wanted: it is never held.

    ``parts`` gives consecutive rows, always the same ones.
    """

    shape: tuple[int, int]
    parts: Callable[[], Iterable[Matrix]]

    def gram(self) -> Matrix:
        """A^T A (n, n)."""
        total = square(self.shape[1])
        for number, part in enumerate(self.parts()):
            if number:
                total += part.T @ part
            else:
                np.matmul(part.T, part, out=total)
        return total

    def onto(self, right: Matrix) -> Matrix:
        """A^T (A B)."""
        total = np.zeros_like(right)
        for part in self.parts():
            total += part.T @ (part @ right)
        return total

    def times(self, right: Matrix) -> Strips:
        """A B."""
        return Strips((self.shape[0], right.shape[1]), lambda: (part @ right for part in self.parts()))

    def held(self) -> Strips:
        """The same, from now on held."""
        found = list(self.parts())
        return Strips(self.shape, lambda: found)


def strips_of(matrix: Matrix) -> Strips:
    """A matrix that is held, as one strip."""
    return Strips((matrix.shape[0], matrix.shape[1]), lambda: (matrix,))


def beside(matrices: Sequence[Strips]) -> Strips:
    """[A_1 .. A_T], of strips that have the same rows."""

    def parts() -> Iterator[Matrix]:
        for rows in zip(*(matrix.parts() for matrix in matrices), strict=True):
            yield np.concatenate(rows, axis=1)

    return Strips((matrices[0].shape[0], sum(matrix.shape[1] for matrix in matrices)), parts)


def finite(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """With 0 in place of NaN and infinity, which no decomposition survives."""
    fine = np.isfinite(values)
    return values if fine.all() else np.where(fine, values, np.zeros((), values.dtype))


def descending(gram: Matrix) -> tuple[Matrix, Matrix]:
    """The eigenvalues of a positive semi-definite matrix (n, n), the largest first, and vectors; it is used up."""
    values, vectors = eigenproblem(gram)
    return values, vectors(len(values))


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
    found = _largest(tall, count)
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
    wide = given.shape[0] < given.shape[1]
    root = inverse_root(given.T if wide else given, tolerance)
    return root.sigma, root.matrix @ given if wide else given @ root.matrix


class InverseRoot(NamedTuple):
    """(A^T A)^-1/2 of a matrix A (m, n), m >= n, on what counts, and its singular values there, the largest first."""

    matrix: Matrix
    sigma: Matrix


def inverse_root(matrix: Matrix | Strips, tolerance: float = 0.0) -> InverseRoot:
    tall = matrix if isinstance(matrix, Strips) else strips_of(matrix)
    sigma, right = _right_side(tall)
    count = int((sigma > _floor(tall.shape, tolerance) * sigma.max(initial=0)).sum())
    half = right[:, :count]
    half /= np.sqrt(sigma[:count])
    return InverseRoot(half @ half.T, sigma[:count])


class RightSide(NamedTuple):
    """The largest singular values (k,) of a matrix (m, n), the largest first, and their right vectors (n, k)."""

    sigma: Matrix
    vectors: Matrix


def right_side(tall: Strips, count: Count | None = None, tolerance: float = 0.0) -> RightSide:
    """Of the largest ``count`` singular triplets, all by default, and fewer where the rank is less."""
    if count == 0:
        return RightSide(np.zeros(0), np.zeros((tall.shape[1], 0)))
    sigma, vectors = _right_side(tall, count)
    found = sigma[: _counted(count, sigma)]
    kept = int((found > _floor(tall.shape, tolerance) * found.max(initial=0)).sum())
    return RightSide(found[:kept], np.ascontiguousarray(vectors[:, :kept]))


def orthogonal_sum(parts: Sequence[Triplets]) -> Matrix:
    """The (m, n) matrix of all triplets side by side, their vectors replaced by the polar factors of the joint ones.

    U G_U^-1/2 S G_V^-1/2 V^T with G the Gram matrices of the joint vectors: nothing as long as these is made twice.
    """
    joint = combined(parts, orthogonal=False)
    if len(parts) == 1 or joint.rank > min(len(joint.left), len(joint.right)):
        return combined(parts, orthogonal=True).matrix()
    middle = (inverse_root(joint.left).matrix * joint.sigma) @ inverse_root(joint.right).matrix
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


def _largest(tall: Matrix, count: Count | None) -> Triplets:
    sigma, right = _right_side(strips_of(tall), count)
    wanted = _counted(count, sigma)
    left = tall @ right[:, :wanted]
    left /= np.maximum(sigma[:wanted], np.finfo(np.float64).tiny)
    return Triplets(left, sigma[:wanted], right[:, :wanted])


def _right_side(tall: Strips, count: Count | None = None) -> tuple[Matrix, Matrix]:
    """All singular values of A (m, n), m >= n, the largest first, and the right vectors (n, k) of ``count`` at least.

    Only the ``count`` largest are exact.
    """
    values, make = eigenproblem(tall.gram())
    sigma = np.sqrt(np.maximum(values, 0))
    wanted = _counted(count, sigma)
    exact = not wanted or values[wanted - 1] > _SAFE * values[0]
    vectors = make(wanted if exact else len(sigma))
    del make
    if not exact:
        _refine(tall, sigma, vectors)
    return sigma, vectors


def _refine(tall: Strips, sigma: Matrix, vectors: Matrix) -> None:
    """Find the small singular values again, and their vectors: from the matrix times these, block by block."""
    settled, rounding = int((sigma > sqrt(_GOOD) * sigma[0]).sum()), _floor(tall.shape, 0.0) * sigma[0]
    while settled < len(sigma):
        high, low = vectors[:, :settled], vectors[:, settled:]
        astray = high.T @ tall.onto(low)
        low -= high @ (astray / (sigma[:settled] ** 2)[:, None])
        image = tall.times(low).gram()
        if sqrt(float(np.trace(image))) <= rounding:
            sigma[settled:] = 0
            return
        values, turn = descending(image)
        low[:] = low @ turn
        sigma[settled:] = np.sqrt(np.maximum(values, 0))
        done = values > (_GOOD if values[-1] <= _SAFE * values[0] else 0.0) * values[0]
        settled += max(1, int(done.sum()))


def _floor(shape: tuple[int, ...], tolerance: float) -> float:
    """The share of the largest singular value up to which one counts as zero."""
    return max(tolerance, 10 * max(shape) * float(np.finfo(np.float64).eps))

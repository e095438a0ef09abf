"""The Tucker form of a difference with any number of axes: a small core, and one factor with unit columns per axis.

    D ~ core x_0 F_0 x_1 F_1 ..,    F_n (d_n, r_n) orthonormal,    core = D x_0 F_0^T x_1 F_1^T ..

so that the squared error is |D|^2 - |core|^2. The first F_n hold the leading eigenvectors of the Gram matrices of the
unfoldings (De Lathauwer, De Moor, Vandewalle, "A multilinear singular value decomposition", SIAM J. Matrix Anal. 2000);
then one axis after the other takes the best for what the others are (higher-order orthogonal iteration, "On the best
rank-1 and rank-(R1, .., RN) approximation", same volume), which never makes it worse. Everything is fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import NamedTuple

import numpy as np

from ..kernels.dtypes import rounded
from .lowrank import Array, Limits, LowRank, Matrix, rank_within, signs

#: Sweeps over the axes, and the growth of |core| at which they end.
_SWEEPS, _SETTLED = 5, 1e-6


class Tucker(NamedTuple):
    """``factors[n]`` (d_n, r_n) and ``core`` (r_0, r_1, ..); an axis of rank 0 where the difference is zero."""

    factors: list[Array]
    core: Array

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.core.shape

    def rounded(self, dtype: str) -> Tucker:
        """To a safetensors code."""
        return Tucker([rounded(factor, dtype) for factor in self.factors], rounded(self.core, dtype))

    def array(self) -> Matrix:
        """What it stands for (d_0, d_1, ..), fp64."""
        return multiplied(self.core.astype(np.float64), [factor.astype(np.float64) for factor in self.factors])


def multiplied(array: Matrix, matrices: Sequence[Matrix], but: int | None = None) -> Matrix:
    """``array x_0 matrices[0] x_1 ..``: axis n times a matrix (new, d_n); without axis ``but``."""
    for axis, matrix in enumerate(matrices):
        if axis != but:
            array = np.moveaxis(np.tensordot(matrix, array, (1, axis)), 0, axis)
    return array


def tucker(array: Matrix, limits: Limits) -> Tucker:
    """Of at most ``limits.rank`` directions for each axis, and as few as leave ``limits.error`` (relative) for sure."""
    bases = [np.linalg.eigh(_gram(array, axis)) for axis in range(array.ndim)]
    ranks = _ranks([basis.eigenvalues for basis in bases], array.size, limits)
    factors = [_leading(np.asarray(basis.eigenvectors), rank) for basis, rank in zip(bases, ranks, strict=True)]
    core, size = multiplied(array, [factor.T for factor in factors]), 0.0
    for _ in range(_SWEEPS):
        for axis, rank in enumerate(ranks):
            rest = multiplied(array, [factor.T for factor in factors], axis)
            factors[axis] = _leading(np.asarray(np.linalg.eigh(_gram(rest, axis)).eigenvectors), rank)
        core = multiplied(array, [factor.T for factor in factors])
        before, size = size, float(np.linalg.norm(core))
        if size <= before * (1 + _SETTLED):
            break
    return Tucker(list(factors), core)


def of_matrix(found: LowRank) -> Tucker:
    """The form of a matrix (m, n), whose core is diagonal."""
    return Tucker([found.left, found.right.T], np.diag(found.sigma))


def _ranks(eigenvalues: Sequence[Matrix], count: int, limits: Limits) -> list[int]:
    """For each axis: its share of the error is one in as many as there are axes; no more than the others can fill."""
    share = None if limits.error is None else limits.error / sqrt(len(eigenvalues))
    ranks = []
    for values in eigenvalues:
        squares = np.maximum(values[::-1], 0.0)
        lost = float(squares[0]) * np.finfo(np.float64).eps * count
        ranks.append(rank_within(Limits(limits.rank, share), squares, lost))
    return [min(rank, prod(ranks[:axis] + ranks[axis + 1 :])) for axis, rank in enumerate(ranks)]


def _gram(array: Matrix, axis: int) -> Matrix:
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    return np.asarray(rows @ rows.T)


def _leading(vectors: Matrix, rank: int) -> Matrix:
    """The last columns, the last of them first; the component that is largest in magnitude is positive."""
    found = vectors[:, ::-1][:, :rank]
    return found * signs(found)

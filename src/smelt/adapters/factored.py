"""Weighted sums of low-rank products, without ever making the matrices.

    D = sum_i c_i B_i A_i = B A,    B = [sqrt|c_1| B_1, sqrt|c_2| B_2, ..],    A = [sign(c_1) sqrt|c_1| A_1; ..]

exactly, with R the sum of the ranks. Of the thin decompositions B = Q_B R_B and A^T = Q_A R_A only the small
triangles are made: the singular values of D are those of their product, and so are its vectors, times the values:

    R_B R_A^T = u diag(s) v^T,    U diag(s) = B R_A^T v,    diag(s) V^T = u^T R_B A

so that nothing is solved for, and cutting off the smallest values gives the best approximation of the exact sum
(Eckart and Young, 1936). Everything is fp64. Cost: O((m + n) R^2), where D alone would cost m n R.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import copysign, sqrt
from typing import NamedTuple

import numpy as np

from ..checkpoint import Factors
from ..methods.low_rank import Core, core
from .lowrank import Array, Limits, LowRank, Matrix, rank_within, signs

_STRIP = 1024

#: No limits: all directions that there are.
EVERYTHING = Limits(rank=1 << 62)


class Term(NamedTuple):
    """``weight`` times ``scaling`` times B (m, r) times A (r, n): an adapter's own factor, and its part in a sum."""

    b: Array
    a: Array
    scaling: float
    weight: float = 1.0

    @property
    def factor(self) -> float:
        return self.weight * self.scaling


def side_by_side(terms: Sequence[Term]) -> tuple[Matrix, Matrix]:
    """B (m, R) and A (R, n) whose product is the sum of the terms (one or more); a negative factor turns A's sign."""
    width = sum(term.b.shape[1] for term in terms)
    b, a = np.empty((len(terms[0].b), width)), np.empty((width, terms[0].a.shape[1]))
    end = 0
    for term in terms:
        part = slice(end, end := end + term.b.shape[1])
        root = sqrt(abs(term.factor))
        np.multiply(term.b, root, out=b[:, part], dtype=np.float64)
        np.multiply(term.a, copysign(root, term.factor), out=a[part], dtype=np.float64)
    return b, a


def summed(terms: Sequence[Term], limits: Limits) -> LowRank:
    """The best approximation of the sum of the terms within ``limits``; without limits the sum itself.

    Directions that rounding alone makes (equal adapters, adapters that cancel) are left out, so the rank may
    be below R. The sign of each direction is that of :func:`smelt.adapters.lowrank.low_rank`.
    """
    b, a = side_by_side(terms)
    left, right = _triangle(b), _triangle(a.T)
    u, sigma, vt = np.linalg.svd(left @ right.T, full_matrices=False)
    size = float(np.linalg.norm(left)) * float(np.linalg.norm(right))
    rank = rank_within(limits, sigma * sigma, _lost(size, (len(b), a.shape[1])))
    kept = sigma[:rank]
    outer = b @ (right.T @ (vt[:rank].T / kept))
    inner = ((u[:, :rank] / kept).T @ left) @ a
    return _signed(outer, inner, sigma)


def _triangle(tall: Matrix) -> Matrix:
    """R of the thin decomposition Q R, strip after strip, each of which stays in the cache."""
    found = tall[:0]
    for start in range(0, len(tall), _STRIP):
        found = np.asarray(np.linalg.qr(np.concatenate([found, tall[start : start + _STRIP]]), mode="r"))
    return found


def _lost(size: float, shape: tuple[int, int]) -> float:
    """The square of the singular values that rounding makes of zero, in what was computed from norms of ``size``."""
    return float((10 * np.finfo(np.float64).eps * max(shape) * size) ** 2)


def _signed(outer: Matrix, inner: Matrix, sigma: Matrix) -> LowRank:
    """Of singular vectors (m, r) and (r, n) and all singular values."""
    sign = signs(inner.T if len(outer) >= inner.shape[1] else outer)
    rank = len(inner)
    return LowRank(outer * sign, sigma[:rank], sign[:, None] * inner, float(np.linalg.norm(sigma)), sigma)


def norm_of(outer: Matrix, inner: Matrix) -> float:
    """Frobenius norm of ``outer inner``, (m, k) times (k, n); what is below 1e-8 of the factors' norms is lost."""
    return sqrt(max(0.0, float(np.vdot(outer.T @ outer, inner @ inner.T))))


def apart(found: LowRank, b: Array, a: Array) -> float:
    """``|found - b a|`` with other factors (m, r) and (r, n), fp64."""
    return norm_of(np.concatenate([found.left * found.sigma, -b], axis=1), np.concatenate([found.right, a]))


def rounding(found: LowRank, b: Array, a: Array) -> float:
    """``|found - b a|`` with its own factors as they are stored, each with the root of the values.

    With L R exact, L R - b a = (L - b) R + b (R - a): sums of small things instead of the difference of large ones.
    """
    root, stored = np.sqrt(found.sigma), (b.astype(np.float64), a.astype(np.float64))
    outer, inner = found.left * root, root[:, None] * found.right
    return norm_of(np.concatenate([outer - stored[0], stored[0]], axis=1), np.concatenate([inner, inner - stored[1]]))


def core_of(terms: Sequence[Term]) -> Core:
    """The space that one or more terms share, and each in it without its weight."""
    return core([Factors(term.b, term.a, term.scaling) for term in terms])


def outside(space: Core, merged: Array, limits: Limits) -> LowRank:
    """What a matrix of the core (p, q) is in the module, within ``limits``."""
    u, sigma, vt = np.linalg.svd(merged.astype(np.float64), full_matrices=False)
    rank = rank_within(limits, sigma * sigma, _lost(float(np.linalg.norm(sigma)), merged.shape))
    return _signed(space.left @ u[:, :rank], vt[:rank] @ space.right.T, sigma)

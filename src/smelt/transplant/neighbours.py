"""A vector as a combination of its nearest neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Matrix = npt.NDArray[np.float64]

SCHEMES = ("distance_proportional", "barycentric", "least_squares")


class Neighbours:
    """The ``k`` nearest of the atoms (N, d), by Euclidean distance or by 1 - cosine, and weights for them.

    Schemes: "distance_proportional" (1 / distance, or the cosine; the sum is one), "least_squares" (the
    combination nearest to the target) and "barycentric" (the same with a sum of one). Of equal distances the
    first atom is nearer.
    """

    def __init__(self, atoms: Array, k: int, cosine: bool, scheme: str) -> None:
        self._atoms = np.ascontiguousarray(atoms, np.float64)
        self._units = _units(self._atoms) if cosine else self._atoms
        self._squares = np.einsum("nd,nd->n", self._units, self._units)
        self._k, self._cosine, self._scheme = min(k, len(atoms)), cosine, scheme

    def __call__(self, targets: Array) -> list[tuple[Array, Matrix]]:
        """For each of the targets (T, d) the neighbours' indices and weights."""
        exact = targets.astype(np.float64)
        units = _units(exact) if self._cosine else exact
        far = self._squares - 2 * (units @ self._units.T)
        return [self._one(target, unit, row) for target, unit, row in zip(exact, units, far, strict=True)]

    def _one(self, target: Matrix, unit: Matrix, far: Matrix) -> tuple[Array, Matrix]:
        bar = np.partition(far, self._k - 1)[self._k - 1]
        near = np.flatnonzero(far <= bar)
        near = near[np.argsort(far[near], kind="stable")][: self._k]
        if self._scheme == "distance_proportional":
            return near, _proportional(unit, self._units[near], self._cosine)
        return near, _fitted(target, self._atoms[near], self._scheme == "barycentric")


def _units(rows: Matrix) -> Matrix:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def _proportional(target: Matrix, near: Matrix, cosine: bool) -> Matrix:
    """Weights that fall with the distance; atoms that are the target share it alone."""
    if cosine:
        weights = near @ target
    else:
        distance = np.linalg.norm(near - target, axis=1)
        weights = (distance == 0).astype(np.float64) if (distance == 0).any() else 1 / distance
    total = weights.sum()
    return np.full(len(near), 1 / len(near)) if total == 0 else weights / total


def _fitted(target: Matrix, near: Matrix, sums_to_one: bool) -> Matrix:
    """Least squares, by the normal equations with a border for the sum."""
    if not sums_to_one:
        return np.asarray(np.linalg.lstsq(near.T, target, rcond=None)[0])
    k = len(near)
    bordered = np.ones((k + 1, k + 1))
    bordered[:k, :k] = near @ near.T
    bordered[k, k] = 0
    return np.asarray(np.linalg.lstsq(bordered, np.append(near @ target, 1.0), rcond=None)[0][:k])

"""How large a change of one tensor is as an operator, from passes over its rows in bounded memory.

The hybrid norm of OTA-merging (see :mod:`smelt.methods.ota`), but for factors that cancel between two
changes of one tensor:

- a vector: its L2 norm;
- token embedding and head (by their names): the largest norm of a column;
- any other matrix: its largest singular value.

The singular value comes from the Lanczos process on A^T A with full reorthogonalisation, one pass per step,
begun at a fixed vector: until the residual of its square is below 1e-5 of it, after ``steps`` steps at the latest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.program import Rows
from ..kernels.random import key_of, words
from .registry import Steps

Vector = npt.NDArray[np.float64]

#: A change: a function of rows of the operands, which returns (rows, row length).
Change = tuple[Callable[..., Any], Mapping[str, Any]]

EMBEDDINGS = ("lm_head.weight", "model.embed_tokens.weight")

_CONVERGED = 1e-5


def operator_norms(name: str, shape: tuple[int, ...], changes: Sequence[Change], steps: int) -> Steps:
    """The norm of each of the ``changes`` of the tensor ``name``: a list of floats."""
    if len(shape) < 2 or name in EMBEDDINGS:
        squares = yield tuple(Rows(partial(_column_squares, change), given, total=True) for change, given in changes)
        return [float(np.sqrt(each.sum() if len(shape) < 2 else each.max())) for each in squares]
    searches = [_Lanczos(shape[-1], min(steps, shape[-1])) for _ in changes]
    while active := [(search, change) for search, change in zip(searches, changes, strict=True) if not search.done]:
        products = yield tuple(
            Rows(partial(_twice, change, search.basis[-1]), given, total=True) for search, (change, given) in active
        )
        for (search, _), product in zip(active, products, strict=True):
            search.absorb(product)
    return [search.norm for search in searches]


def _column_squares(change: Callable[..., Any], **rows: Any) -> Vector:
    squares = np.square(change(**rows), dtype=np.float64)
    return np.asarray(squares.sum(axis=0))


def _twice(change: Callable[..., Any], vector: Vector, **rows: Any) -> Vector:
    """A^T A v for these rows of A."""
    matrix = np.asarray(change(**rows), np.float64)
    return np.asarray(matrix.T @ (matrix @ vector))


class _Lanczos:
    """The largest eigenvalue of a symmetric matrix that is only known by its products."""

    def __init__(self, size: int, steps: int) -> None:
        start = words(key_of(0, "operator norm", 0), 0, size).astype(np.float64) - 2.0**31
        self.basis: list[Vector] = [start / np.linalg.norm(start)]
        self.norm = 0.0
        self.done = False
        self._steps = steps
        self._diagonal: list[float] = []
        self._beside: list[float] = []

    def absorb(self, product: Vector) -> None:
        """Take the matrix times the newest vector of the basis."""
        self._diagonal.append(float(self.basis[-1] @ product))
        known = np.stack(self.basis)
        rest = product - known.T @ (known @ product)
        rest -= known.T @ (known @ rest)
        beside = float(np.linalg.norm(rest))
        largest, last = self._largest()
        self.norm = float(np.sqrt(max(largest, 0.0)))
        self.done = beside * abs(last) <= _CONVERGED * largest or len(self.basis) >= self._steps
        self._beside.append(beside)
        if not self.done:
            self.basis.append(rest / beside)

    def _largest(self) -> tuple[float, float]:
        """The largest eigenvalue of the projection, and the last entry of its vector."""
        off = self._beside
        values, vectors = np.linalg.eigh(np.diag(self._diagonal) + np.diag(off, 1) + np.diag(off, -1))
        return float(values[-1]), float(vectors[-1, -1])

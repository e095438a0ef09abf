"""RegMean: for each linear layer the weight whose outputs fit every model's outputs in least squares.

Jin et al., "Dataless knowledge fusion by merging weights of language models", ICLR 2023,
https://arxiv.org/abs/2212.09849:

    W = (sum_i W_i G_i) (sum_i G_i)^-1,    G_i = X_i^T X_i / rows,

with the off-diagonal part of each G_i multiplied by ``reduce_non_diagonal_ratio``. W_i is (out, in), G_i is
(in, in). Solved by Cholesky in fp64 on the correction to the plain mean, which is small; where the sum of the
Grams is singular a relative ridge of 1e-10 of its mean diagonal is added.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def regression_mean(
    models: tuple[Any, ...], grams: tuple[Any, ...], reduce_non_diagonal_ratio: float
) -> npt.NDArray[Any]:
    """``models`` are n matrices (out, in), ``grams`` n matrices (in, in); returns (out, in)."""
    weights = [np.asarray(model, np.float64) for model in models]
    shrunk = [_shrink(np.asarray(gram, np.float64), reduce_non_diagonal_ratio) for gram in grams]
    mean = np.add.reduce(weights) / len(weights)
    correction = np.add.reduce([(w - mean) @ gram for w, gram in zip(weights, shrunk, strict=True)])
    return mean + _solve(np.add.reduce(shrunk), correction.T).T  # type: ignore[no-any-return]


def _shrink(gram: Matrix, ratio: float) -> Matrix:
    return ratio * gram + (1 - ratio) * np.diag(np.diag(gram))


def _solve(gram: Matrix, right: Matrix) -> Matrix:
    """gram^-1 right for a symmetric positive semi-definite ``gram``."""
    ridge = 1e-10 * float(np.trace(gram)) / len(gram)
    for shift in (0.0, ridge, 1e3 * ridge):
        try:
            factor = np.linalg.cholesky(gram + shift * np.eye(len(gram)))
        except np.linalg.LinAlgError:
            continue
        return np.asarray(np.linalg.solve(factor.T, np.linalg.solve(factor, right)), np.float64)
    return np.asarray(np.linalg.lstsq(gram, right, rcond=None)[0], np.float64)

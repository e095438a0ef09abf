"""RegMean: for each linear layer the weight whose outputs fit every model's outputs in least squares.

Jin et al., "Dataless knowledge fusion by merging weights of language models", ICLR 2023,
https://arxiv.org/abs/2212.09849:

    W = (sum_i c_i W_i G_i) (sum_i c_i G_i)^-1,    G_i = X_i^T X_i / rows,

with the off-diagonal part of each G_i multiplied by ``reduce_non_diagonal_ratio`` and c_i the ``weight`` over the
sum of all. W_i is (out, in), G_i is (in, in), the mean of x x^T over the inputs x that the layer of model i saw;
the G_i are given as statistics of kind ``gram``. Tensors without one (embeddings, norms, biases), and matrices
that ``average`` names, take the mean with the weights c_i.

Solved in fp64 for the correction to that mean, which is small; a feature that no input ever had keeps the mean.
Where the sum of the Grams is singular a relative ridge of 1e-10 of its mean diagonal is added (1e-7 where that
does not suffice).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.program import Call, Copy, Whole, call
from .linear import weighted_sum
from .registry import EXCLUDE, Citation, Method, Parameter, Statistic, weight_parameter
from .task_matrices import held
from .tensors import Tensor

Matrix = npt.NDArray[np.float64]

#: The smallest share of the largest pivot at which a Gram matrix still counts as regular.
_REGULAR = 1e-6


def merge(tensor: Tensor) -> Call | Copy | Whole:
    if tensor.size == 1:
        return Copy(tensor.models[0])
    weights = _shares(tensor.each["weight"])
    if _averaged(tensor):
        return call(weighted_sum, models=tensor.models, weights=weights)
    return Whole(regression_mean, {
        "models": tensor.models, "grams": tensor.statistics["gram"],
        "reduce_non_diagonal_ratio": tensor["reduce_non_diagonal_ratio"], "weights": weights,
    })  # fmt: skip


def _shares(weights: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(weight / sum(weights) for weight in weights)


def _averaged(tensor: Tensor) -> bool:
    return "gram" not in tensor.statistics or any(re.match(pattern, tensor.name) for pattern in tensor["average"])


def regression_mean(
    models: tuple[Any, ...], grams: tuple[Any, ...], reduce_non_diagonal_ratio: float,
    weights: tuple[float, ...] | None = None,
) -> Matrix:  # fmt: skip
    """``models`` are n matrices (out, in), ``grams`` n matrices (in, in), ``weights`` sum to 1; returns (out, in)."""
    shares = weights or (1 / len(models),) * len(models)
    mean = np.zeros(models[0].shape)
    for share, model in zip(shares, models, strict=True):
        mean += share * model.astype(np.float64, copy=False)
    total, pull = np.zeros((mean.shape[1],) * 2), np.zeros_like(mean)
    for share, model, gram in zip(shares, models, grams, strict=True):
        seen = _shrunk(gram, share, reduce_non_diagonal_ratio)
        total += seen
        pull += np.subtract(model, mean) @ seen
    if reduce_non_diagonal_ratio == 0:
        spread = np.diag(total)
        return np.asarray(mean + pull / np.where(spread > 0, spread, 1))
    mean += _solved(total, pull.T).T
    return mean


def _shrunk(gram: npt.NDArray[Any], share: float, ratio: float) -> Matrix:
    """``share`` of the Gram matrix, and ``ratio`` of that off the diagonal."""
    own: Matrix = np.multiply(gram, share * ratio, dtype=np.float64)
    np.fill_diagonal(own, share * np.diag(gram).astype(np.float64))
    return own


def _solved(gram: Matrix, right: Matrix) -> Matrix:
    """gram^-1 right for a symmetric positive semi-definite ``gram``."""
    ridge = 1e-10 * float(np.trace(gram)) / len(gram)
    for shift in (0.0, ridge, 1e3 * ridge):
        shifted = gram.copy() if shift else gram
        shifted.flat[:: len(gram) + 1] += shift
        if _is_regular(shifted):
            return np.asarray(np.linalg.solve(shifted, right), np.float64)
    return np.asarray(np.linalg.lstsq(gram, right, rcond=None)[0], np.float64)


def _is_regular(gram: Matrix) -> bool:
    try:
        pivots = np.diag(np.linalg.cholesky(gram))
    except np.linalg.LinAlgError:
        return False
    return bool(pivots.min() > _REGULAR * pivots.max())


def holds(tensor: Tensor) -> tuple[int, int]:
    """The models, the mean, the pull and the correction; the Gram matrices, and six squares of their size."""
    if len(tensor.shape) != 2 or "gram" not in tensor.statistics:
        return 1, 0
    return held(tensor, 4 * tensor.size + 38, 6 + tensor.size / 2, tensor.shape[1])


METHODS = (
    Method(
        name="regmean",
        title="RegMean, regression mean",
        summary="per linear layer the weight that fits all models' outputs in least squares",
        advice="For models of one architecture whose inputs' Gram matrices are known, with or without a common base.",
        citation=Citation(
            "Dataless knowledge fusion by merging weights of language models", "Jin et al.", "ICLR 2023",
            "https://arxiv.org/abs/2212.09849",
        ),
        merge=merge,
        base="ignored",
        holds=holds,
        parameters=(
            weight_parameter(1.0, low=0, open_low=True, mergekit=False),
            Parameter("reduce_non_diagonal_ratio", "float", 0.9, "factor off the diagonal of each Gram matrix; 0: "
                      "per-feature weights", low=0, high=1, mergekit=False),
            Parameter("average", "strings", (), "regular expressions, anchored at the start: such tensors are averaged",
                      mergekit=False),
            Parameter("missing", "str", "error", "a matrix that only some models have a Gram matrix of: error, or "
                      "their mean", choices=("error", "mean"), mergekit=False),
            EXCLUDE,
        ),
        statistics=(Statistic("gram", "square", partial=True, signed=True),),
        keeps_excluded="first",
    ),
)  # fmt: skip

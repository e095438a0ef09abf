"""LoRE-Merging: estimate an unknown base together with low-rank task vectors, then merge these.

Liu, Wu, Yao, Fu, She, Han, Zhong, Yuan, "LoRE-Merging: exploring low-rank estimation for large language model
merging", Findings of EMNLP 2025, https://arxiv.org/abs/2502.10749. Per matrix, from delta_i = 0, ``max_iter`` times
(sooner where theta_0 no longer moves):

1. theta_0 <- mean_i (theta_i - delta_i);
2. delta_i <- theta_i - theta_0 with every singular value s replaced by max(s - mu, 0), mu = ``threshold``;

theta = theta_0 + lambda sum_i w_i delta_i, w_i the ``weight`` over the sum of all. ``lambda: 0`` gives the
estimated base, for use with other methods.

``threshold`` is taken literally: it minimises 1/2 |theta_0 + delta_i - theta_i|^2 + mu |delta_i|_*, of which the
paper's formula has other constants. Vectors have no rank: theta_0 is their mean, nothing is taken off. Tensors of
more axes are taken as (first axis, all others). Two models of equal weight give their mean, whatever mu is; so do
all where mu exceeds every singular value.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..kernels.program import Call, Whole, call
from .linear import weighted_sum
from .registry import EXCLUDE, LAMBDA, Citation, Method, Parameter, weight_parameter
from .spectral import Matrix, triplets
from .task_matrices import held
from .tensors import Tensor

#: theta_0 rests once it moves by less than this share of its norm.
_STILL = 1e-12


def merge(tensor: Tensor) -> Call | Whole:
    scale, weights = tensor["lambda"], tensor.each["weight"]
    shares = tuple(weight / sum(weights) for weight in weights)
    if len(tensor.shape) < 2:
        even = (1 - scale) / tensor.size
        return call(weighted_sum, models=tensor.models, weights=tuple(even + scale * share for share in shares))
    return Whole(merged, {
        "models": tensor.models, "shares": shares, "scale": scale, "threshold": tensor["threshold"],
        "rounds": tensor["max_iter"],
    })  # fmt: skip


def merged(models: tuple[Any, ...], shares: tuple[float, ...], scale: float, threshold: float, rounds: int) -> Matrix:
    """The merge of n tensors of one shape; in fp64."""
    matrices = [np.asarray(model, np.float64).reshape(len(model), -1) for model in models]
    base, deltas = estimated(matrices, threshold, rounds)
    change = sum(share * delta for share, delta in zip(shares, deltas, strict=True))
    return np.asarray(base + scale * change).reshape(models[0].shape)


def estimated(models: list[Matrix], threshold: float, rounds: int) -> tuple[Matrix, list[Matrix]]:
    """The estimated base and the task vectors of matrices of one shape."""
    base = _mean(models)
    deltas = [shrunk(model - base, threshold) for model in models]
    for _ in range(rounds - 1):
        moved = _mean(model - delta for model, delta in zip(models, deltas, strict=True))
        still = np.linalg.norm(moved - base) <= _STILL * np.linalg.norm(base)
        base = moved
        if still:
            break
        deltas = [shrunk(model - base, threshold) for model in models]
    return base, deltas


def _mean(matrices: Iterable[Matrix]) -> Matrix:
    """One at a time."""
    total, count = np.zeros(()), 0
    for matrix in matrices:
        total, count = total + matrix, count + 1
    return np.asarray(total / count, np.float64)


def shrunk(matrix: Matrix, threshold: float) -> Matrix:
    """``matrix`` with ``threshold`` taken off every singular value, down to 0."""
    if np.linalg.norm(matrix) <= threshold:
        return np.zeros_like(matrix)
    kept = triplets(matrix, lambda sigma: int((sigma > threshold).sum()))
    return np.asarray((kept.left * (kept.sigma - threshold)) @ kept.right.T)


def holds(tensor: Tensor) -> tuple[int, int]:
    """Operands in fp32; in fp64 the models, their task vectors, and vectors of one of them; base and result."""
    if len(tensor.shape) < 2:
        return 1, 0
    columns = tensor.count // max(1, tensor.shape[0])
    return held(tensor, 28 * tensor.size + 40, 3, min(tensor.shape[0], columns))


METHODS = (
    Method(
        name="lore",
        title="LoRE-Merging, low-rank estimation",
        summary="estimate the base together with low-rank task vectors, then add these",
        advice="For three or more models, or unequal weights, whose common base is not known; two of equal weight "
               "give the mean.",
        citation=Citation(
            "LoRE-Merging: exploring low-rank estimation for large language model merging", "Liu et al.",
            "Findings of EMNLP 2025", "https://arxiv.org/abs/2502.10749",
        ),
        merge=merge,
        base="ignored",
        min_models=2,
        holds=holds,
        parameters=(
            weight_parameter(1.0, low=0, open_low=True, mergekit=False),
            LAMBDA,
            Parameter("threshold", "float", 0.01, "taken off every singular value of a task vector", low=0,
                      mergekit=False),
            Parameter("max_iter", "int", 20, "rounds at most", low=1, mergekit=False),
            EXCLUDE,
        ),
        keeps_excluded="first",
    ),
)  # fmt: skip

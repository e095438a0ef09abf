"""Given curvatures (Adam's second moment, a Fisher) as methods use them: compressed, raised to a power, times tau^2.

``rank1_approx`` stands for the matrix of rank one with the curvature's sums of rows and of columns,
r c / sum(r); ``rank`` for its truncated singular value decomposition, nothing below 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ..kernels.broadcast import LowRank, rank_one
from ..kernels.program import Operand, Rows
from ..kernels.vocabulary import sqrt, where
from .operator_norm import Change, operator_norms
from .registry import Citation, Statistic, Steps
from .tensors import Tensor, delta, identity

#: OTA-merging and fast Fisher grafting are two parts of one paper.
CITATION = Citation(
    "Harnessing optimization dynamics for curvature-informed model merging", "Mahdavinia et al.", "arXiv 2025",
    "https://arxiv.org/abs/2509.11167",
)  # fmt: skip

CURVATURE = Statistic("exp_avg_sq", also=("fisher",), factored=True)

#: Binary places of a power.
_PLACES = 24


def saliency(base: Any, model: Any, curvature: Any) -> Any:
    """What reverting the change costs to second order, but for a factor of 2."""
    tau = model - base
    return curvature * (tau * tau)


def powered(x: Any, digits: Any) -> Any:
    """``x`` to the power that the ``digits`` spell: a 2 multiplies by x, then each 1 or 0 halves the exponent."""
    root = x
    result = 1
    for digit in digits:
        root = where(digit == 2, root, sqrt(root))
        result = where(digit > 0, result * root, result)
    return result


def digits_of(power: float) -> tuple[float, ...]:
    """``power`` > 0 in binary, rounded to 24 places and at least the smallest of them, for :func:`powered`."""
    steps = 1 << _PLACES
    ones, places = divmod(max(1, round(power * steps)), steps)
    text = f"{places:0{_PLACES}b}".rstrip("0")
    return (2.0,) * ones + tuple(float(digit) for digit in text)


def compressed(curvatures: Sequence[Operand], flat: Sequence[bool], ranks: Sequence[int]) -> Steps:
    """The curvatures of one tensor, those of matrices replaced where ``flat`` (rank one) or a rank says so."""
    found = list(curvatures)
    matrices = [i for i, curvature in enumerate(found) if len(curvature.shape) == 2 and curvature.count]
    sums = [i for i in matrices if flat[i]]
    cuts = [i for i in matrices if ranks[i] and not flat[i]]
    requests = [
        Rows(part, {"x": found[i]}, total=part is column_sums) for i in sums for part in (row_sums, column_sums)
    ]
    answers = yield (*requests, *(Rows(identity, {"x": found[i]}) for i in cuts))
    for place, i in enumerate(sums):
        found[i] = rank_one(answers[2 * place], answers[2 * place + 1])
    for i, matrix in zip(cuts, answers[2 * len(sums) :], strict=True):
        found[i] = truncated(matrix, ranks[i])
    return tuple(found)


def row_sums(x: Any) -> Any:
    return x.sum(axis=1, dtype=np.float64)


def column_sums(x: Any) -> Any:
    return x.sum(axis=0, dtype=np.float64)


def truncated(matrix: Any, rank: int) -> LowRank:
    """The ``rank`` largest singular values and vectors of a whole matrix."""
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return LowRank(left[:, :rank] * values[:rank], right[:rank])


def restored(
    tensor: Tensor, curvatures: Sequence[Operand], thresholds: Sequence[float], masked: Any, least: float, steps: int
) -> Steps:
    """Per model, what gives the masked task vector the norm that the whole one has; 0 where too little is left.

    ``masked(base, model, curvature, threshold)`` is the masked task vector. Too little is ``least`` of the norm.
    """
    assert tensor.base is not None
    changes: list[Change] = []
    for model, curvature, threshold in zip(tensor.models, curvatures, thresholds, strict=True):
        pair: dict[str, Operand] = {"base": tensor.base, "model": model}
        masking = partial(masked, threshold=np.float32(threshold))
        changes += [(delta, pair), (masking, {**pair, "curvature": curvature})]
    norms = yield from operator_norms(tensor.name, tensor.shape, changes, steps)
    pairs = zip(norms[::2], norms[1::2], strict=True)
    return tuple(whole / left if left > least * whole else 0.0 for whole, left in pairs)

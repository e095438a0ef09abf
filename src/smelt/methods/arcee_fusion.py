"""Arcee Fusion: take from the model what matters most, leave the rest as in the base.

The method of Arcee's mergekit (https://github.com/arcee-ai/mergekit), for one model beside the base:

    I = |theta_1 - theta_0| KL(softmax(row of theta_1) || softmax(row of theta_0))

with rows along the last axis and 1e-8 added to each probability. theta is theta_1 where I is at least the median
plus 1.5 times the distance of the quartiles of its tensor, else theta_0. The quantile q of n sorted values is the
one at int(q (n - 1)); it is exact here, where mergekit samples tensors of more than a million elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.broadcast import PerRow
from ..kernels.program import Rank, Rows, call
from ..kernels.vocabulary import where
from .registry import Citation, Method, Steps
from .tensors import Tensor

Array = npt.NDArray[Any]


def importance(base: Any, model: Any, divergence: Any) -> Any:
    return abs(model - base) * divergence


def swap_important(base: Any, model: Any, divergence: Any, threshold: Any) -> Any:
    return where(importance(base, model, divergence) >= threshold, model, base)


def divergence_of_rows(base: Array, model: Array) -> Array:
    p, q = probabilities(model), probabilities(base)
    return np.asarray(np.maximum((p * np.log(p / q)).sum(axis=1), 0))


def probabilities(rows: Array) -> Array:
    powers = np.exp(np.float64(rows) - rows.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True) + 1e-8)


def merge(tensor: Tensor) -> Steps:
    given = {"base": tensor.base, "model": tensor.models[0]}
    (divergences,) = yield (Rows(divergence_of_rows, given),)
    given["divergence"] = PerRow(divergences, tensor.shape)
    score = call(importance, **given)
    ranks = [int(share * (tensor.count - 1)) + 1 for share in (0.25, 0.5, 0.75)]
    low, median, high = yield tuple(Rank((score,), rank) for rank in ranks)
    return call(swap_important, threshold=median + 1.5 * (high - low), **given)


METHODS = (
    Method(
        name="arcee_fusion",
        title="Arcee Fusion",
        summary="take the elements of one model that matter most, the rest from the base",
        advice="To take over only the strongest changes of one fine-tune.",
        citation=Citation("MergeKit: arcee_fusion", "Arcee AI", "2024", "https://github.com/arcee-ai/mergekit"),
        merge=merge,
        passes=lambda parameters: (0, 2),
        searches=lambda tensor: 3,
        max_models=1,
    ),
)

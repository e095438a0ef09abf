"""AIM: shrink a merge's changes of the weights that see large activations.

Nobari, Alim, ArjomandBigdeli, Srivastava, Ahmed, Azizan, "Activation-informed merging of large language
models", 2025, https://arxiv.org/abs/2502.02421. With s the mean |activation| of each input channel of a layer of
the base (``statistics``, one checkpoint for all models):

    theta = theta_0 + (1 - (1 - omega) s / max s) lambda sum_i w_i (theta_i - theta_0)

The most active channel keeps ``omega`` of its change, a silent one all of it. One model is relaxed as it is;
several are added as in task arithmetic first. ``clip`` takes that quantile of s instead of its maximum (above
it s counts as equal), where few channels are enormous. Tensors without s (embeddings, biases) are not
relaxed; a vector has one channel per element. Where all of s is 0 nothing is relaxed.

The flavour ``original`` is the authors' code, which rounds each difference to the type of the weights.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.broadcast import PerColumn, vector
from ..kernels.program import call
from ..kernels.vocabulary import where
from .registry import EXCLUDE, LAMBDA, Citation, Method, Parameter, Statistic, Steps, weight_parameter
from .task_arithmetic import add_task_vectors
from .tensors import Tensor

#: Mantissa bits that a rounding to these types drops from a float32.
_DROPPED = {"BF16": 16, "F16": 13}


def relaxed(base: Any, models: Any, weights: Any, scale: Any, activity: Any, rest: Any) -> Any:
    total = 0
    for model, weight in zip(models, weights):  # noqa: B905
        total += weight * (model - base)
    return base + scale * total * (1 - activity * rest)


def relaxed_in_short(base: Any, models: Any, weights: Any, scale: Any, activity: Any, rest: Any, splits: Any) -> Any:
    """The same from differences rounded to a 16-bit type."""
    total = 0
    for model, weight in zip(models, weights):  # noqa: B905
        total += weight * shortened(model - base, splits)
    return base + scale * total * (1 - activity * rest)


def shortened(x: Any, splits: Any) -> Any:
    """``x`` rounded to nearest, ties to even. ``splits`` are 2^s + 1 for s the bits to drop, one less, one more."""
    near = leading(x, splits[0])
    half_way = (near != x) & (leading(x, splits[1]) == x)
    odd = leading(near, splits[2]) != near
    return where(half_way & odd, near + 2 * (x - near), near)


def leading(x: Any, split: Any) -> Any:
    """``x`` rounded to fewer bits, ties to either side (Dekker's splitting)."""
    large = x * split
    return large - (large - x)


def merge(tensor: Tensor) -> Steps:
    assert tensor.base is not None
    chosen = {
        "base": tensor.base, "models": tensor.models, "weights": tensor.each["weight"], "scale": tensor["lambda"],
    }  # fmt: skip
    yield ()
    if "input_abs_mean" not in tensor.statistics:
        return call(add_task_vectors, **chosen)
    activity = shares(vector(tensor.statistics["input_abs_mean"][0]), tensor["clip"])
    more = {"activity": PerColumn(activity, tensor.shape), "rest": 1 - tensor["omega"]}
    types = {operand.dtype for operand in (tensor.base, *tensor.models)}
    dropped = _DROPPED.get(types.pop(), 0) if len(types) == 1 else 0
    if tensor.variant == "original" and dropped:
        splits = tuple(2.0 ** (dropped + change) + 1 for change in (0, -1, 1))
        return call(relaxed_in_short, splits=splits, **more, **chosen)
    return call(relaxed, **more, **chosen)


def shares(activity: npt.NDArray[np.float64], clip: float) -> npt.NDArray[np.float64]:
    """Activations as shares of the largest, or of the quantile ``clip``, in [0, 1]."""
    rank = max(1, ceil(clip * len(activity)))
    largest = np.partition(activity, rank - 1)[rank - 1]
    return np.minimum(activity / largest, 1) if largest > 0 else np.zeros_like(activity)


METHODS = (
    Method(
        name="aim",
        title="AIM, activation-informed merging",
        summary="shrink the merged change where the base's activations are large",
        advice="After another merge, given as the only model, where it overshoots: omega 0.2-0.6.",
        citation=Citation(
            "Activation-informed merging of large language models", "Nobari et al.", "arXiv 2025",
            "https://arxiv.org/abs/2502.02421",
        ),
        merge=merge,
        parameters=(
            Parameter("omega", "float", 0.4, "share of the change that the most active channel keeps", low=0, high=1,
                      mergekit=False),
            weight_parameter(1.0),
            LAMBDA,
            Parameter("clip", "float", 1.0, "quantile of the activations that counts as the largest", low=0, high=1,
                      open_low=True, mergekit=False),
            EXCLUDE,
        ),
        variants=("paper", "original"),
        statistics=(Statistic("input_abs_mean", "columns", single=True, partial=True),),
    ),
)  # fmt: skip

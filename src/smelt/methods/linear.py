"""Weighted average of the models' weights; uniform and greedy soups are made of it.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time", ICML 2022, https://arxiv.org/abs/2203.05482.

    theta = sum_i w_i theta_i / sum_i w_i        (the division only with ``normalize``)

Edge cases: weights that sum to zero cannot be normalised and are refused.
"""

from __future__ import annotations

from typing import Any

from ..errors import UsageError
from ..kernels.program import Call, call
from .registry import Citation, Method, Parameter, weight_parameter
from .tensors import Tensor


def weighted_sum(models: Any, weights: Any) -> Any:
    total = -0.0  # the zero that adds nothing: a sum of negative zeros stays one
    for model, weight in zip(models, weights):  # noqa: B905
        total += weight * model
    return total


def weighted_mean(models: Any, weights: Any, mass: Any) -> Any:
    total = -0.0  # the zero that adds nothing: a sum of negative zeros stays one
    for model, weight in zip(models, weights):  # noqa: B905
        total += weight * model
    return total / mass


def merge(tensor: Tensor) -> Call:
    weights = tensor.each["weight"]
    if not tensor["normalize"]:
        return call(weighted_sum, models=tensor.models, weights=weights)
    mass = sum(weights)
    if abs(mass) < 1e-12:
        raise UsageError(f"the weights of {tensor.name} sum to zero: set normalize: false or change them")
    return call(weighted_mean, models=tensor.models, weights=weights, mass=mass)


METHODS = (
    Method(
        name="linear",
        title="Weighted average, model soup",
        summary="mean of the models, weighted",
        advice="The first thing to try with fine-tunes of one base, or checkpoints of one run.",
        citation=Citation(
            "Model soups: averaging weights of multiple fine-tuned models improves accuracy without "
            "increasing inference time",
            "Wortsman et al.",
            "ICML 2022",
            "https://arxiv.org/abs/2203.05482",
        ),
        merge=merge,
        base="ignored",
        parameters=(
            weight_parameter(defaults=(("paper", 1.0),)),
            Parameter("normalize", "bool", True, "divide by the sum of the weights"),
        ),
        variants=("paper", "mergekit"),
    ),
)

"""Add, subtract and combine task vectors.

Ilharco et al., "Editing models with task arithmetic", ICLR 2023, https://arxiv.org/abs/2212.04089.

    theta = theta_0 + lambda * sum_i w_i (theta_i - theta_0)

A negative weight forgets a task. mergekit's flavour may divide the sum by sum_i w_i (``normalize``; a sum
below 1e-8 in size counts as 1). One model with lambda t interpolates between base and fine-tune (WiSE-FT).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..kernels.program import Call, Copy, call
from .registry import EXCLUDE, LAMBDA, Citation, Method, Parameter, Running, weight_parameter
from .tensors import Tensor


def add_task_vectors(base: Any, models: Any, weights: Any, scale: Any) -> Any:
    total = 0
    for model, weight in zip(models, weights):  # noqa: B905
        total += weight * (model - base)
    return base + scale * total


def add_scaled(base: Any, total: Any, scale: Any) -> Any:
    return base + scale * total


def running_sum(base: Any, models: Any, weights: Any, before: Any) -> Any:
    total = before
    for model, weight in zip(models, weights):  # noqa: B905
        total += weight * (model - base)
    return total


def merge(tensor: Tensor) -> Call | Copy:
    assert tensor.base is not None
    if tensor.state is not None:
        return call(add_scaled, base=tensor.base, total=tensor.state, scale=tensor["lambda"])
    if not tensor.models:
        return Copy(tensor.base)
    weights = tensor.each["weight"]
    scale = tensor["lambda"] / (mass(weights) if tensor["normalize"] else 1.0)
    return call(add_task_vectors, base=tensor.base, models=tensor.models, weights=weights, scale=scale)


def sum_of(tensor: Tensor, weights: tuple[float, ...]) -> Call:
    """The sum that :func:`add_task_vectors` scales, from that of earlier models on."""
    before = 0.0 if tensor.before is None else tensor.before
    return call(running_sum, base=tensor.base, models=tensor.models, weights=weights, before=before)


def _obstacle(shared: Mapping[str, Any]) -> str | None:
    return "with normalize it is divided by the weights of all models" if shared["normalize"] else None


def mass(weights: tuple[float, ...]) -> float:
    """The sum of the weights; 1 where it vanishes."""
    total = sum(weights)
    return total if abs(total) >= 1e-8 else 1.0


#: mergekit accepts these for its whole family; they only change temporaries there.
INT8_MASK = Parameter("int8_mask", "bool", False, "accepted for compatibility: has no effect on the result")

METHODS = (
    Method(
        name="task_arithmetic",
        title="Task arithmetic",
        summary="base plus a weighted sum of task vectors",
        advice="For several fine-tunes of one base; start with lambda 0.3-0.5 for many tasks, 1 for few.",
        citation=Citation(
            "Editing models with task arithmetic",
            "Ilharco et al.",
            "ICLR 2023",
            "https://arxiv.org/abs/2212.04089",
        ),
        merge=merge,
        min_models=0,
        parameters=(
            weight_parameter(defaults=(("paper", 1.0),)),
            LAMBDA,
            Parameter("normalize", "bool", False, "divide the sum of task vectors by the sum of the weights"),
            Parameter("density", "float", 1.0, "accepted for compatibility: has no effect", per_model=True),
            Parameter("rescale", "bool", False, "accepted for compatibility: has no effect"),
            INT8_MASK,
            EXCLUDE,
        ),
        variants=("paper", "mergekit"),
        running=Running(state=lambda tensor: sum_of(tensor, tensor.each["weight"]), obstacle=_obstacle),
    ),
)

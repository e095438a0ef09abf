"""EMR-Merging: elect one vector for all tasks, then mask and rescale it for each.

Huang et al., "EMR-Merging: tuning-free high-performance model merging", NeurIPS 2024,
https://arxiv.org/abs/2405.17461.

    tau_i     = theta_i - theta_0,   g = 1 where sum_i tau_i > 0, else -1
    mask_i    = 1 where tau_i g > 0
    unified   = g max_i |tau_i| mask_i
    rescale_i = sum over tensors of mean |tau_i| / sum over tensors of mean |mask_i unified|
    theta = theta_0 + unified, and for each task theta_0 + rescale_i mask_i unified

The authors' code gives every tensor the same weight in the two sums (``rescale: tensor_mean``); the paper sums
over all elements (``element``). A task that never agrees with the majority has an empty mask: its model is the base.
Excluded tensors (classifiers) belong to each task: they are the task's own, and the base's in the unified model.
"""

from __future__ import annotations

from math import fsum
from typing import Any

from ..kernels.program import Bits, Call, Number, Output, Totals, call
from ..kernels.vocabulary import where
from .parts import FOR_A_TASK, TASK, task_of
from .registry import EXCLUDE, Citation, Method, Parameter, Steps
from .tensors import Model, Tensor


def majority(base: Any, models: Any) -> Any:
    """g."""
    total = 0
    for model in models:
        total += model - base
    return where(total > 0, 1, -1)


def elected(base: Any, models: Any) -> Any:
    """The unified vector's element."""
    direction = majority(base, models)
    largest = 0
    for model in models:
        agreeing = (model - base) * direction
        largest = where(agreeing > largest, agreeing, largest)
    return direction * largest


def agrees(base: Any, models: Any, own: Any) -> Any:
    return (own - base) * majority(base, models) > 0


def mask(base: Any, models: Any, own: Any) -> Any:
    return where(agrees(base, models, own), 1, 0)


def sizes(base: Any, models: Any, own: Any) -> Any:
    """|tau_i| and |mask_i unified|."""
    return (abs(own - base), where(agrees(base, models, own), abs(elected(base, models)), 0))


def unified_model(base: Any, models: Any) -> Any:
    return base + elected(base, models)


def task_model(base: Any, models: Any, own: Any, scale: Any) -> Any:
    return base + where(agrees(base, models, own), scale * elected(base, models), 0)


def survey(model: Model) -> Steps:
    """rescale_i for all tasks; None where only the unified model is made."""
    if model["task"] is None:
        return None
    sums = yield tuple(
        Totals((call(sizes, base=tensor.base, models=tensor.models, own=own),))
        for tensor in model.tensors
        for own in tensor.models
    )
    weights = [1.0 if model["rescale"] == "element" else 1.0 / max(1, tensor.count) for tensor in model.tensors]
    return tuple(_ratio(weights, sums[task :: model.size]) for task in range(model.size))


def _ratio(weights: list[float], sums: list[list[float]]) -> float:
    before, after = (fsum(w * pair[k] for w, pair in zip(weights, sums, strict=True)) for k in (0, 1))
    return before / after if after else 1.0


def merge(tensor: Tensor) -> Call:
    task = task_of(tensor)
    if task is None:
        return call(unified_model, base=tensor.base, models=tensor.models)
    own, scale = tensor.models[task], rescalers(tensor)[task]
    return call(task_model, base=tensor.base, models=tensor.models, own=own, scale=scale)


def parts(tensor: Tensor) -> dict[str, Output]:
    shared: dict[str, Any] = {"base": tensor.base, "models": tensor.models}
    found: dict[str, Output] = {"unified": call(elected, **shared)}
    for task, own in enumerate(tensor.models):
        found[f"mask.{task}"] = Bits(call(mask, own=own, **shared))
        found[f"rescale.{task}"] = Number(rescalers(tensor)[task])
    return found


def rescalers(tensor: Tensor) -> tuple[float, ...]:
    return tensor.survey or (1.0,) * tensor.size


METHODS = (
    Method(
        name="emr_merging",
        title="EMR-Merging",
        summary="elect one vector for all tasks, mask and rescale it for each",
        advice="To keep several fine-tunes in little space without any data or tuning.",
        citation=Citation(
            "EMR-Merging: tuning-free high-performance model merging", "Huang et al.", "NeurIPS 2024",
            "https://arxiv.org/abs/2405.17461",
        ),
        merge=merge,
        survey=survey,
        parts=parts,
        passes=lambda parameters: (int(parameters["task"] is not None), 0),
        parameters=(
            TASK,
            Parameter("rescale", "str", "tensor_mean", "whether tensors or elements count alike in the rescaling",
                      choices=("tensor_mean", "element"), mergekit=False, when=FOR_A_TASK),
            EXCLUDE,
        ),
    ),
)  # fmt: skip

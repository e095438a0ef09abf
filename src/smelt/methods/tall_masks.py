"""TALL masks: find each task in the sum of all task vectors; consensus merging drops what few tasks use.

Wang et al., "Localizing task information for improved model merging and compression", ICML 2024,
https://arxiv.org/abs/2405.07813.

    tau_i = theta_i - theta_0,   tau_M = sum_i tau_i                       (``multi_task_vector: sum``)
    m_i   = 1 where |tau_i| > lambda_i |tau_M - tau_i|, else 0
    tall_masks:  theta = theta_0 + tau_M, and for each task theta_0 + m_i tau_M
    consensus:   theta = theta_0 + alpha tau_M where sum_i m_i >= min_tasks, theta_0 elsewhere

``ties_sum`` takes TIES' disjoint sum for tau_M; ``density`` trims each task vector to its largest elements,
counted over the whole model, before they are added. Masks always compare with the untrimmed tau_i, by the
difference above; the authors' code compares |theta_0 - theta_i| with lambda |theta_0 + tau_M - theta_i|, the
same but for rounding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import UsageError
from ..kernels.program import Bits, Call, Output, call
from ..kernels.vocabulary import where
from . import ties
from .election import elect_by_mass, trimmed
from .parts import FOR_A_TASK, TASK, task_of
from .registry import EXCLUDE, Citation, Method, Parameter, Steps
from .tensors import Model, Tensor

# --- the element formulas -------------------------------------------------------------------------------
# Shared arguments: those of TIES' formulas, and ``elect``: whether only values of the elected sign are added.


def multi_task(
    base: Any, models: Any, kept: Any, thresholds: Any, centers: Any, factors: Any, fallback: Any, elect: bool
) -> Any:
    """tau_M."""
    direction = 0
    if elect:
        direction = elect_by_mass(base, models, kept, thresholds, centers, factors, fallback)
    total = 0
    for model, keep, threshold, center in zip(models, kept, thresholds, centers):  # noqa: B905
        tau = trimmed(base, model, keep, threshold, center)
        total += where((tau * direction > 0) | (not elect), tau, 0)
    return total


def in_use(base: Any, model: Any, total: Any, bar: Any) -> Any:
    """m_i: the sum serves the task better than the base does."""
    tau = model - base
    return abs(tau) > bar * abs(total - tau)


def users(base: Any, models: Any, total: Any, bars: Any) -> Any:
    """How many tasks use the element."""
    count = 0
    for model, bar in zip(models, bars):  # noqa: B905
        count += where(in_use(base, model, total, bar), 1, 0)
    return count


def unified_model(
    base: Any, models: Any, kept: Any, thresholds: Any, centers: Any, factors: Any, fallback: Any, elect: bool
) -> Any:
    return base + multi_task(base, models, kept, thresholds, centers, factors, fallback, elect)


def task_mask(
    base: Any, models: Any, kept: Any, thresholds: Any, centers: Any, factors: Any, fallback: Any, elect: bool,
    own: Any, bar: Any,
) -> Any:  # fmt: skip
    total = multi_task(base, models, kept, thresholds, centers, factors, fallback, elect)
    return where(in_use(base, own, total, bar), 1, 0)


def task_model(
    base: Any, models: Any, kept: Any, thresholds: Any, centers: Any, factors: Any, fallback: Any, elect: bool,
    own: Any, bar: Any,
) -> Any:  # fmt: skip
    total = multi_task(base, models, kept, thresholds, centers, factors, fallback, elect)
    return base + where(in_use(base, own, total, bar), total, 0)


def consensus_mask(
    base: Any, models: Any, kept: Any, thresholds: Any, centers: Any, factors: Any, fallback: Any, elect: bool,
    bars: Any, least: Any,
) -> Any:  # fmt: skip
    total = multi_task(base, models, kept, thresholds, centers, factors, fallback, elect)
    return where(users(base, models, total, bars) >= least, 1, 0)


def consensus_model(
    base: Any, models: Any, kept: Any, thresholds: Any, centers: Any, factors: Any, fallback: Any, elect: bool,
    bars: Any, least: Any, scale: Any,
) -> Any:  # fmt: skip
    total = multi_task(base, models, kept, thresholds, centers, factors, fallback, elect)
    return base + where(users(base, models, total, bars) >= least, scale * total, 0)


# --- what must be known first: thresholds, and TIES' majority sign ----------------------------------------


def density_of(parameters: Any) -> float:
    given = parameters["density"]
    return float(given) if given is not None else 0.2 if parameters["multi_task_vector"] == "ties_sum" else 1.0


def as_ties(tensor: Tensor) -> Tensor:
    """The tensor as TIES' paper flavour sees it, trimmed to ``density``."""
    shared = {"trim": "topk", "rounding": "ge", "sign": "mass"}
    each = {"density": (density_of(tensor),) * tensor.size}
    return replace(tensor, shared=shared, each=each)


def survey(model: Model) -> Steps:
    """(thresholds, fallback sign); None for the plain sum, which needs to know nothing."""
    seen = Model(tuple(map(as_ties, model.tensors)))
    if model["multi_task_vector"] == "ties_sum":
        thresholds, _, _, majority = yield from ties.know(seen.tensors, seen, ties.nothing_dropped)
        return thresholds, majority
    if density_of(model) >= 1:
        return None
    thresholds, _ = yield from ties.select(seen.tensors, seen, ties.nothing_dropped)
    return thresholds, 0.0


def passes(parameters: dict[str, Any]) -> tuple[int, int]:
    if parameters["multi_task_vector"] == "ties_sum":
        return 2, 0
    return (0 if density_of(parameters) >= 1 else 1), 0


def vector(tensor: Tensor) -> dict[str, Any]:
    """The arguments that make tau_M."""
    ones = (1.0,) * tensor.size
    thresholds, fallback = tensor.survey or ((0.0,) * tensor.size, 0.0)
    return {
        "base": tensor.base, "models": tensor.models, "kept": ties.nothing_dropped(tensor), "thresholds": thresholds,
        "centers": (0.0,) * tensor.size, "factors": ones, "fallback": fallback,
        "elect": tensor["multi_task_vector"] == "ties_sum",
    }  # fmt: skip


# --- the outputs ----------------------------------------------------------------------------------------


def merge(tensor: Tensor) -> Call:
    task = task_of(tensor)
    if task is None:
        return call(unified_model, **vector(tensor))
    return call(task_model, own=tensor.models[task], bar=tensor.each["lambda"][task], **vector(tensor))


def parts(tensor: Tensor) -> dict[str, Output]:
    shared, bars = vector(tensor), tensor.each["lambda"]
    found: dict[str, Output] = {"unified": call(multi_task, **shared)}
    for task, (own, bar) in enumerate(zip(tensor.models, bars, strict=True)):
        found[f"mask.{task}"] = Bits(call(task_mask, own=own, bar=bar, **shared))
    return found


def merge_by_consensus(tensor: Tensor) -> Call:
    return call(consensus_model, scale=tensor["alpha"], **votes(tensor))


def consensus_parts(tensor: Tensor) -> dict[str, Output]:
    return {"consensus": Bits(call(consensus_mask, **votes(tensor)))}


def votes(tensor: Tensor) -> dict[str, Any]:
    """The arguments that tell where enough tasks agree."""
    least = tensor["min_tasks"]
    if least is None:
        least = min(2, tensor.size)
    elif tensor.size == 1 and least > 1:
        raise UsageError(f"min_tasks {least} with one model would reset everything to the base: give more models")
    return {"bars": tensor.each["lambda"], "least": float(least), **vector(tensor)}


CITATION = Citation(
    "Localizing task information for improved model merging and compression", "Wang et al.", "ICML 2024",
    "https://arxiv.org/abs/2405.07813",
)  # fmt: skip

_VECTOR = (
    Parameter("multi_task_vector", "str", "sum", "what is searched: the sum of the task vectors, or TIES' disjoint sum",
              choices=("sum", "ties_sum"), mergekit=False),
    Parameter("density", "float", None, "share of each task vector that is added; by default 1, with ties_sum 0.2",
              low=0, high=1, mergekit=False),
)  # fmt: skip


def mask_parameter(**more: Any) -> Parameter:
    return Parameter(
        "lambda", "float", 0.4, "how far a task must outweigh the rest: 0.2 to 0.6, smaller keeps more",
        per_model=True, low=0, mergekit=False, **more,
    )  # fmt: skip


METHODS = (
    Method(
        name="tall_masks",
        title="TALL masks",
        summary="one vector for all tasks and one bit per parameter and task",
        advice="To keep many fine-tunes in little space; choose each lambda by a validation score.",
        citation=CITATION,
        merge=merge,
        survey=survey,
        parts=parts,
        passes=passes,
        searches=lambda tensor: tensor.size,
        parameters=(TASK, mask_parameter(when=FOR_A_TASK), *_VECTOR, EXCLUDE),
    ),
    Method(
        name="consensus",
        title="Consensus merging",
        summary="sum of task vectors where enough tasks use it, base elsewhere",
        advice="As task_arithmetic for 8 tasks and more: min_tasks 2, alpha 0.3 or by a validation score.",
        citation=CITATION,
        merge=merge_by_consensus,
        survey=survey,
        parts=consensus_parts,
        passes=passes,
        searches=lambda tensor: tensor.size,
        parameters=(
            mask_parameter(),
            Parameter("min_tasks", "int", None, "tasks that must use an element; by default 2, with one model 1",
                      low=0, mergekit=False),
            Parameter("alpha", "float", 0.3, "factor of the kept vector", low=0, mergekit=False),
            *_VECTOR,
            EXCLUDE,
        ),
    ),
)  # fmt: skip

"""SCE: select where the models differ most, calculate each one's weight there, erase what goes against the rest.

Wan et al., "FuseChat: knowledge fusion of chat models", second version, EMNLP 2025,
https://arxiv.org/abs/2408.07990. Per tensor, with tau_i = theta_i - theta_0:

1. select: of the elements whose variance over the models is not zero, the share ``select_topk`` where it is
   largest (among equal ones the lowest index wins).
2. calculate: w_i = sum of tau_i^2 over the selected elements, divided by the sum of these; equal where it is 0.
3. erase: the sign of sum_i tau_i is elected, an even vote counting as positive; others are dropped.
4. theta = theta_0 + sum w_i tau_i / sum w_i over what is left; theta_0 where nothing is selected.

Flavours. ``paper`` as above. ``fusechat`` is the authors' code: the selection makes the weights only, every
element is merged. ``mergekit``: equal weights when the mean squares add up to less than 1e-6 (so for nearly all
language models), and no divisor below 1e-6.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..kernels.program import Call, Copy, Top, Totals, call
from ..kernels.vocabulary import maximum, where
from .registry import EXCLUDE, Citation, Method, Parameter, Steps
from .task_arithmetic import INT8_MASK
from .tensors import Tensor
from .varm import shares, total_change

# --- the element formulas -------------------------------------------------------------------------------


def variance(base: Any, models: Any, share: Any) -> Any:
    """The population variance of the task vectors, exactly 0 where they agree; ``share`` is 1 / models."""
    first = models[0] - base
    total = 0
    for model in models:
        total += (model - base) - first
    center = first + share * total
    squares = 0
    for model in models:
        off = (model - base) - center
        squares += off * off
    return share * squares


def varies(base: Any, models: Any, share: Any) -> Any:
    return (where(variance(base, models, share) > 0, 1, 0),)


def selected_square(base: Any, model: Any, models: Any, share: Any, bar: Any) -> Any:
    tau = model - base
    return (where(variance(base, models, share) >= bar, tau * tau, 0),)


def consensus(base: Any, models: Any, weights: Any, least: Any) -> Any:
    """The weighted mean of the values whose sign is that of the sum; no divisor is below ``least``."""
    vote = 0
    for model in models:
        vote += model - base
    direction = where(vote >= 0, 1, -1)
    total = 0
    mass = 0
    for model, weight in zip(models, weights):  # noqa: B905
        tau = model - base
        total += where(tau * direction > 0, weight * tau, 0)
        mass += where(tau * direction > 0, weight, 0)
    return base + total / maximum(mass, least)


def selected_consensus(base: Any, models: Any, weights: Any, least: Any, share: Any, bar: Any) -> Any:
    return where(variance(base, models, share) >= bar, consensus(base, models, weights, least), base)


# --- the method -----------------------------------------------------------------------------------------


class _Flavour(NamedTuple):
    """Whether values are selected too, the mean square below which weights are equal, the least divisor."""

    selects_values: bool
    least_square: float
    least_mass: float


_TINY = float(np.finfo(np.float32).tiny)
_FLAVOURS = {
    "paper": _Flavour(True, 0.0, _TINY),
    "fusechat": _Flavour(False, 0.0, _TINY),
    "mergekit": _Flavour(True, 1e-6, 1e-6),
}


def merge(tensor: Tensor) -> Steps:
    if not tensor.models:
        return Copy(tensor.base)  # type: ignore[arg-type]
    flavour = _FLAVOURS[tensor.variant]
    inputs = {"base": tensor.base, "models": tensor.models}
    chosen: dict[str, Any] = {}
    if tensor["select_topk"] < 1:
        share = 1 / len(tensor.models)
        bar = yield from _bar(tensor, {**inputs, "share": share})
        chosen = {"share": share, "bar": bar}
    weights = yield from _weights(tensor, chosen, flavour.least_square)
    formula = selected_consensus if chosen and flavour.selects_values else consensus
    selection = chosen if formula is selected_consensus else {}
    return call(formula, weights=weights, least=flavour.least_mass, **inputs, **selection)


def _bar(tensor: Tensor, inputs: dict[str, Any]) -> Steps:
    """The variance at and above which elements are selected."""
    ((varied,),) = yield (Totals((call(varies, **inputs),)),)
    keep = int(tensor["select_topk"] * varied)
    if not keep:
        return float("inf")
    (bar,) = yield (Top(call(variance, **inputs), keep),)
    return bar


def _weights(tensor: Tensor, chosen: dict[str, Any], least_square: float) -> Steps:
    """Each model's share of the squared change on the selected elements."""
    squares = yield tuple(Totals((_square(tensor, model, chosen),)) for model in tensor.models)
    energies = [energy for (energy,) in squares]
    return shares(energies if sum(energies) >= least_square * tensor.count else [1.0] * len(energies))


def _square(tensor: Tensor, model: Any, chosen: dict[str, Any]) -> Call:
    if not chosen:
        return call(total_change, base=tensor.base, model=model, square=True)
    return call(selected_square, base=tensor.base, model=model, models=tensor.models, **chosen)


def passes(parameters: dict[str, Any]) -> tuple[int, int]:
    return 0, 3 if parameters["select_topk"] < 1 else 1


METHODS = (
    Method(
        name="sce",
        title="SCE: select, calculate, erase",
        summary="mean of the values that agree in sign, weighted by each model's change where the models differ",
        advice="For several chat models tuned from one base: select_topk 0.1 to 1.",
        citation=Citation(
            "FuseChat: knowledge fusion of chat models", "Wan et al.", "EMNLP 2025", "https://arxiv.org/abs/2408.07990"
        ),
        merge=merge,
        passes=passes,
        searches=lambda tensor: int(tensor["select_topk"] < 1),
        min_models=0,
        parameters=(
            Parameter("select_topk", "float", 1.0, "share of the varying elements that is selected", low=0, high=1),
            INT8_MASK,
            EXCLUDE,
        ),
        variants=("paper", "fusechat", "mergekit"),
    ),
)

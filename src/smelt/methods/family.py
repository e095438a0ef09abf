"""What the methods that mergekit builds on task arithmetic share: thin task vectors, rescale, then add or elect.

    theta = theta_0 + lambda * D / q,    D = sum of the values w_i r_i tau_i that count, q = sum of their weights

``normalize`` divides by q (where it vanishes, by 1). With an election the values of the elected sign count, an
even vote being positive. ``rescale`` gives what is kept of a task vector the L1 norm that it had: r_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..kernels.program import Call, Top, Totals, call
from ..kernels.vocabulary import where
from .election import banded, ties_mean, ties_sum
from .registry import Steps
from .task_arithmetic import mass
from .tensors import Tensor, delta

INFINITY = float("inf")


@dataclass(frozen=True)
class Selection:
    """What is kept of each task vector: what was drawn, of magnitudes in [threshold, limit). One of each per model."""

    kept: tuple[Any, ...]
    thresholds: tuple[Any, ...]
    limits: tuple[Any, ...]


def selection(tensor: Tensor, kept: Any = None, thresholds: Any = None, limits: Any = None) -> Selection:
    """A selection that is limited in what is given, and keeps everything otherwise."""
    size = len(tensor.models)
    return Selection(kept or (True,) * size, thresholds or (0.0,) * size, limits or (INFINITY,) * size)


# --- the element formulas: arguments as in ``election`` ---------------------------------------------------


def add_selected(base: Any, models: Any, kept: Any, thresholds: Any, limits: Any, factors: Any, scale: Any) -> Any:
    total = 0
    for model, keep, threshold, limit, factor in zip(models, kept, thresholds, limits, factors):  # noqa: B905
        total += factor * banded(base, model, keep, threshold, 0, limit)
    return base + scale * total


def norm_before_and_after(base: Any, model: Any, keep: Any, threshold: Any, limit: Any) -> Any:
    """|tau| and |kept tau|: their sums are the L1 norms that ``rescale`` matches."""
    tau = abs(model - base)
    return (tau, where(keep & (tau >= threshold) & (tau < limit), tau, 0))


# --- what they are used for -----------------------------------------------------------------------------


def exact_share(tensor: Tensor) -> Steps:
    """Thresholds that keep exactly max(1, int(density n)) elements: lowest index first among equals."""
    count, densities = tensor.count, tensor.each["density"]
    wanted = {i: max(1, int(d * count)) for i, d in enumerate(densities) if 0 < d < 1}
    found = yield tuple(Top(call(delta, base=tensor.base, model=tensor.models[i]), keep) for i, keep in wanted.items())
    bars = dict(zip(wanted, found, strict=True))
    return tuple(bars.get(i, 0.0 if density >= 1 else INFINITY) for i, density in enumerate(densities))


def rescaled(tensor: Tensor, chosen: Selection) -> Steps:
    """The weights, with ``rescale`` times L1(task vector) / L1(kept part); no factor below 1e-7."""
    weights: tuple[float, ...] = tensor.each["weight"]
    if not tensor["rescale"]:
        return weights
    norms = yield tuple(
        Totals((call(norm_before_and_after, base=tensor.base, model=model, keep=keep, threshold=low, limit=high),))
        for model, keep, low, high in zip(
            tensor.models, chosen.kept, chosen.thresholds, chosen.limits, strict=True
        )
    )  # fmt: skip
    return tuple(
        weight * (before / after if min(before, after) >= 1e-7 else 1.0)
        for weight, (before, after) in zip(weights, norms, strict=True)
    )


def added(tensor: Tensor, chosen: Selection, factors: tuple[Any, ...]) -> Call:
    """The sum of what is kept; with ``normalize`` divided by the sum of the weights."""
    scale = tensor["lambda"] / (mass(tensor.each["weight"]) if tensor["normalize"] else 1.0)
    return call(add_selected, factors=factors, scale=scale, **_operands(tensor, chosen))


def elected(tensor: Tensor, chosen: Selection, factors: tuple[Any, ...]) -> Call:
    """Election by weighted values, an even vote counting as positive; mean with ``normalize``, else sum."""
    weights = tensor.each["weight"]
    shared = {
        "centers": (0.0,) * len(weights), "factors": factors, "fallback": 1.0, "scale": tensor["lambda"],
        **_operands(tensor, chosen),
    }  # fmt: skip
    if tensor["normalize"]:
        return call(ties_mean, weights=weights, **shared)
    return call(ties_sum, **shared)


def _operands(tensor: Tensor, chosen: Selection) -> dict[str, Any]:
    return {
        "base": tensor.base, "models": tensor.models, "kept": chosen.kept, "thresholds": chosen.thresholds,
        "limits": chosen.limits,
    }  # fmt: skip

"""PCB-Merging: every parameter of every model competes for its place; the best share is averaged by score.

Du et al., "Parameter competition balancing for model merging", NeurIPS 2024, https://arxiv.org/abs/2410.02396.
With n models, tau_i = theta_i - theta_0, and order statistics over the whole model (``scope``):

1. a_i = |tau_i| clipped to its ``clip`` and 1 - ``clip`` quantiles, v_i = sign(tau_i) a_i; s_i = a_i rescaled
   to [0, 1], u_i = sign(tau_i) s_i.
2. beta_i = exp(n s_i^2) * agreement of tau_i with all models (``variant``).
3. scale_i: beta_i rescaled so that its 1 - ``ratio`` quantile, and all below, give 0 and its maximum 1.
4. theta = theta_0 + sum_i lambda_i v_i scale_i / sum_i scale_i; theta_0 where no model has a score.

The authors' code has four forms of the agreement, none literally the paper's: ``es`` sum_j tanh(u_i u_j), which
does not depend on the size of the task vectors; ``released`` and ``nlp`` tanh(tau_i sum_j tau_j), which differ in
``clip``; ``vision`` tanh(tau_i sum_j u_j).

Edge cases: a model all of whose changes are of one size (or none) has no scores; where every score above the
quantile is the same, these count as 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any, NamedTuple

import numpy as np

from ..errors import UsageError
from ..kernels.functions import exp_of_negative, tanh, tanh_of_small
from ..kernels.program import Call, Rank, call
from ..kernels.vocabulary import maximum, sign, where
from .registry import EXCLUDE, SCOPE, Citation, Method, Parameter, Steps
from .tensors import Model, Tensor, delta

# --- the element formulas -------------------------------------------------------------------------------
# Shared arguments: lows and highs (the clip values of |tau_i|), n (how many models), ``pairwise`` (es) and
# ``relative`` (vision). ``low`` and ``high`` are those of the one model.


def clipped(tau: Any, low: Any, high: Any) -> Any:
    size = where(abs(tau) < low, low, abs(tau))
    return where(size > high, high, size)


def strength(tau: Any, low: Any, high: Any) -> Any:
    """u: the clipped magnitude from 0 to 1, with the sign of tau."""
    size = (clipped(tau, low, high) - low) / where(high > low, high - low, 1)
    return where(tau < 0, -size, size)


def crowd(base: Any, models: Any, lows: Any, highs: Any, relative: bool) -> Any:
    """The sum of all models' tau, or u."""
    total = 0
    for model, low, high in zip(models, lows, highs):  # noqa: B905
        total += strength(model - base, low, high) if relative else model - base
    return total


def score(
    base: Any, model: Any, low: Any, high: Any, models: Any, lows: Any, highs: Any, n: Any,
    pairwise: bool, relative: bool,
) -> Any:  # fmt: skip
    """beta of one model, over exp(n), which changes no later step."""
    tau = model - base
    own = strength(tau, low, high)
    agreement = 0
    if pairwise:
        for other, least, most in zip(models, lows, highs):  # noqa: B905
            agreement += tanh_of_small(own * strength(other - base, least, most))
    else:
        agreement = tanh(tau * crowd(base, models, lows, highs, relative))
    return exp_of_negative(n * own * own - n) * agreement


def one_side(
    base: Any, model: Any, low: Any, high: Any, models: Any, lows: Any, highs: Any, n: Any,
    pairwise: bool, relative: bool, direction: Any,
) -> Any:  # fmt: skip
    """How far beta lies on the side of 0 that ``direction`` points to; 0 on the other."""
    beta = direction * score(base, model, low, high, models, lows, highs, n, pairwise, relative)
    return where(beta > 0, beta, 0)


def scaled(
    base: Any, model: Any, low: Any, high: Any, models: Any, lows: Any, highs: Any, n: Any,
    pairwise: bool, relative: bool, bar: Any, room: Any,
) -> Any:  # fmt: skip
    """The final score of one model: 0 up to ``bar``, 1 at ``bar + room``."""
    beta = score(base, model, low, high, models, lows, highs, n, pairwise, relative)
    return where(beta > bar, (beta - bar) / room, 0)


def average_by_score(
    base: Any, models: Any, lows: Any, highs: Any, n: Any, pairwise: bool, relative: bool,
    bars: Any, rooms: Any, factors: Any,
) -> Any:  # fmt: skip
    total = 0
    mass = 0
    for model, low, high, bar, room, factor in zip(models, lows, highs, bars, rooms, factors):  # noqa: B905
        weight = scaled(base, model, low, high, models, lows, highs, n, pairwise, relative, bar, room)
        tau = model - base
        total += factor * (sign(tau) * clipped(tau, low, high)) * weight
        mass += weight
    return base + total / maximum(mass, 1e-12)


# --- statistics -----------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """The order statistics of one model: its clip values, the bar that scores must pass, from there to the top."""

    low: float
    high: float
    bar: float = inf
    room: float = 1.0


def know(tensors: tuple[Tensor, ...], view: Tensor | Model) -> Steps:
    """One :class:`Scale` per model, over ``tensors`` together."""
    size, count = len(tensors[0].models), view.count
    if (view["scale_of"] or 0) >= size:
        raise UsageError(f"pcb: scale_of must be below the number of models, {size}, not {view['scale_of']}")
    ranks = int(count * view["clip"]) + 1, int(count * (1 - view["clip"]) - 1) + 1
    ends = yield tuple(Rank(_deltas(tensors, index), rank) for index in range(size) for rank in ranks)
    scales = [Scale(*pair) for pair in zip(ends[::2], ends[1::2], strict=True)]
    quantile = min(int(count * (1 - view["ratio"])), count - 1) + 1
    wanted = [(index, rank) for index in range(size) for rank in (quantile, count)]
    found = yield from _ranked_scores(tensors, scales, wanted)
    return tuple(_scored(scale, bar, top) for scale, bar, top in zip(scales, found[::2], found[1::2], strict=True))


def _deltas(tensors: tuple[Tensor, ...], index: int) -> tuple[Call, ...]:
    return tuple(call(delta, base=tensor.base, model=tensor.models[index]) for tensor in tensors)


def _scored(scale: Scale, bar: float, top: float) -> Scale:
    """A model without spread in its magnitudes stays without scores; scores without spread count as 1."""
    if scale.high <= scale.low:
        return scale
    bar = bar if bar < top else float(np.nextafter(np.float32(top), np.float32(-inf)))
    return Scale(scale.low, scale.high, bar, top - bar)


def _ranked_scores(tensors: tuple[Tensor, ...], scales: list[Scale], wanted: list[tuple[int, int]]) -> Steps:
    """The score of each (model, rank), 1 being the smallest.

    Ranks are of magnitudes, so the positive scores are ranked first, and the negative ones where that gives 0.
    """
    count = sum(tensor.count for tensor in tensors)
    found = yield tuple(Rank(_sides(tensors, scales, index, 1.0), rank) for index, rank in wanted)
    below = [place for place, value in enumerate(found) if value == 0]
    losses = yield tuple(
        Rank(_sides(tensors, scales, wanted[place][0], -1.0), count - wanted[place][1] + 1) for place in below
    )
    found = list(found)
    for place, loss in zip(below, losses, strict=True):
        found[place] = -loss
    return found


def _sides(tensors: tuple[Tensor, ...], scales: list[Scale], index: int, direction: float) -> tuple[Call, ...]:
    return tuple(
        call(one_side, direction=direction, **_of_model(tensor, scales, index), **_of_all(tensor, scales))
        for tensor in tensors
    )


def _of_all(tensor: Tensor, scales: Sequence[Scale]) -> dict[str, Any]:
    """The arguments that every formula shares."""
    return {
        "base": tensor.base, "models": tensor.models, "n": float(len(scales)),
        "lows": tuple(scale.low for scale in scales), "highs": tuple(scale.high for scale in scales),
        "pairwise": tensor.variant == "es", "relative": tensor.variant == "vision",
    }  # fmt: skip


def _of_model(tensor: Tensor, scales: Sequence[Scale], index: int) -> dict[str, Any]:
    return {"model": tensor.models[index], "low": scales[index].low, "high": scales[index].high}


def survey(model: Model) -> Steps:
    if model["scope"] == "tensor":
        return None
    return (yield from know(model.tensors, model))


# --- the method -----------------------------------------------------------------------------------------


def merge(tensor: Tensor) -> Steps:
    known = tensor.survey
    if known is None:
        known = yield from know((tensor,), tensor)
    index, shared = tensor["scale_of"], _of_all(tensor, known)
    if index is not None:
        one = known[index]
        return call(scaled, bar=one.bar, room=one.room, **_of_model(tensor, known, index), **shared)
    bars, rooms = tuple(scale.bar for scale in known), tuple(scale.room for scale in known)
    return call(average_by_score, bars=bars, rooms=rooms, factors=tensor.each["lambda"], **shared)


def passes(parameters: dict[str, Any]) -> tuple[int, int]:
    return (2, 0) if parameters["scope"] == "model" else (0, 2)


METHODS = (
    Method(
        name="pcb",
        title="PCB-Merging: parameter competition balancing",
        summary="the best scored share of each task vector, averaged by score",
        advice="For fine-tunes that interfere, as an alternative to TIES: ratio 0.05-0.2, lambda 1 to 2.",
        citation=Citation(
            "Parameter competition balancing for model merging", "Du et al.", "NeurIPS 2024",
            "https://arxiv.org/abs/2410.02396",
        ),
        merge=merge,
        survey=survey,
        passes=passes,
        searches=lambda tensor: 2 * tensor.size,
        parameters=(
            Parameter("ratio", "float", 0.1, "share of each task vector that keeps a score", low=0, high=1,
                      open_low=True, defaults=(("vision", 0.05),)),
            Parameter("clip", "float", 0.01, "share of the smallest, and of the largest, magnitudes that is clipped",
                      low=0, high=0.25, defaults=(("released", 1e-4),)),
            Parameter("lambda", "float", 1.0, "factor of each task vector", per_model=True,
                      defaults=(("vision", 1.2),)),
            replace(SCOPE, when=None, defaults=()),
            Parameter("scale_of", "int", None, "the final scores of this model (0 is the first) instead of the merge",
                      low=0),
            EXCLUDE,
        ),
        variants=("es", "released", "nlp", "vision"),
    ),
)  # fmt: skip

"""TIES: trim each task vector, elect one sign per parameter, average the values that agree with it.

Yadav et al., "TIES-Merging: resolving interference when merging models", NeurIPS 2023,
https://arxiv.org/abs/2306.01708.

1. tau_i = theta_i - theta_0; keep the largest share k of |tau_i| (``trim``).
2. s = sign(sum_i tau_i), element by element (``sign``); where the sum vanishes, the majority of all signs.
3. tau = mean of the kept tau_i whose sign is s (``merge_func``); theta = theta_0 + lambda tau.

Flavours. ``paper``: one threshold per model over the whole model, equal magnitudes at the threshold all
kept, so int(d k) + 1 elements without ties; models count equally. ``mergekit``: exactly
max(1, int(density n)) elements per tensor (among equal magnitudes the lowest flat index wins), weights vote,
a vanishing sum counts as positive, and ``normalize`` divides by the weights that agree. ``rescale`` gives the
kept values the L1 norm that the task vector had.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import numpy as np

from ..kernels.program import Call, Copy, Rank, Totals, call
from ..kernels.vocabulary import sign, where
from .election import elect_by_mass, ties_mean, ties_sum, trimmed
from .family import INFINITY, elected, exact_share, rescaled, selection
from .registry import EXCLUDE, LAMBDA, SCOPE, Citation, Method, Parameter, Statistic, Steps, weight_parameter
from .task_arithmetic import INT8_MASK
from .tensors import Model, Tensor, delta, kept_delta

# --- the element formulas beside ``election`` -------------------------------------------------------------


def elect_by_norm_mass(
    base: Any, models: Any, kept: Any, thresholds: Any, centers: Any, norms: Any, fallback: Any
) -> Any:
    total = 0
    for model, keep, threshold, center, norm in zip(models, kept, thresholds, centers, norms):  # noqa: B905
        tau = trimmed(base, model, keep, threshold, center)
        total += sign(tau) * (tau * tau / norm)
    return where(total > 0, 1, where(total < 0, -1, fallback))


def elect_by_norm_fraction(
    base: Any, models: Any, kept: Any, thresholds: Any, centers: Any, norms: Any, fallback: Any
) -> Any:
    largest = 0
    elected = 0
    for model, keep, threshold, center, norm in zip(models, kept, thresholds, centers, norms):  # noqa: B905
        tau = trimmed(base, model, keep, threshold, center)
        fraction = tau * tau / norm
        elected = where(fraction > largest, sign(tau), elected)
        largest = where(fraction > largest, fraction, largest)
    return where(elected == 0, fallback, elected)


def ties_general(
    base: Any, models: Any, kept: Any, thresholds: Any, centers: Any, norms: Any, oracle: Any, fallback: Any,
    scale: Any, normmass: bool, normfrac: bool, given: bool, elect: bool,
    take_max: bool, take_mean: bool, take_sum: bool, take_median: bool, disjoint: bool,
) -> Any:  # fmt: skip
    """Every other combination of the paper's code: ``elect`` how (or not), aggregate what, how."""
    direction = elect_by_mass(base, models, kept, thresholds, centers, norms, fallback)
    if normmass:
        direction = elect_by_norm_mass(base, models, kept, thresholds, centers, norms, fallback)
    if normfrac:
        direction = elect_by_norm_fraction(base, models, kept, thresholds, centers, norms, fallback)
    if given:
        direction = where(oracle == 0, fallback, sign(oracle))
    total = 0
    mass = 0
    largest = 0
    strongest = 0
    median = 0
    for model, keep, threshold, center in zip(models, kept, thresholds, centers):  # noqa: B905
        tau = trimmed(base, model, keep, threshold, center)
        agrees = (tau != 0) & ((tau * direction > 0) | (not elect))
        counted = agrees | (not disjoint)
        total += where(counted, tau, 0)
        mass += where(counted, 1, 0)
        strongest = where(counted & (abs(tau) > largest), tau, strongest)
        largest = where(counted & (abs(tau) > largest), abs(tau), largest)
        median = where(is_lower_median(base, models, kept, thresholds, centers, tau), tau, median)
    merged = strongest
    if take_mean:
        merged = total / where(mass == 0, 1, mass)
    if take_sum:
        merged = total
    if take_median:
        merged = median
    if elect and (take_max or not disjoint):
        merged = abs(merged) * direction
    return base + scale * merged


def is_lower_median(base: Any, models: Any, kept: Any, thresholds: Any, centers: Any, candidate: Any) -> Any:
    """Whether ``candidate`` is the lower median of the trimmed values."""
    below = 0
    equal = 0
    count = 0
    for model, keep, threshold, center in zip(models, kept, thresholds, centers):  # noqa: B905
        tau = trimmed(base, model, keep, threshold, center)
        below += where(tau < candidate, 1, 0)
        equal += where(tau == candidate, 1, 0)
        count += 1
    return (2 * below < count) & (2 * (below + equal) >= count)


def vote(base: Any, models: Any, kept: Any, thresholds: Any, centers: Any, factors: Any) -> Any:
    """The elected sign, 0 where the vote is even: summed up it gives the majority."""
    return (elect_by_mass(base, models, kept, thresholds, centers, factors, 0),)


def kept_square(base: Any, model: Any, keep: Any, threshold: Any, center: Any) -> Any:
    tau = trimmed(base, model, keep, threshold, center)
    return (tau * tau,)


def moments(base: Any, model: Any) -> Any:
    tau = model - base
    return (tau, tau * tau)


def mass_above(base: Any, model: Any, bars: Any) -> Any:
    """Squared mass at and above each of seven bars."""
    tau = model - base
    square = tau * tau
    return (
        where(abs(tau) >= bars[0], square, 0),
        where(abs(tau) >= bars[1], square, 0),
        where(abs(tau) >= bars[2], square, 0),
        where(abs(tau) >= bars[3], square, 0),
        where(abs(tau) >= bars[4], square, 0),
        where(abs(tau) >= bars[5], square, 0),
        where(abs(tau) >= bars[6], square, 0),
    )


# --- statistics -----------------------------------------------------------------------------------------

#: The random draws on one tensor, one per model; True where nothing is drawn.
Kept = Callable[[Tensor], tuple[Any, ...]]


def nothing_dropped(tensor: Tensor) -> tuple[bool, ...]:
    return (True,) * len(tensor.models)


def paper_ranks(count: int, densities: tuple[float, ...], rounding: str) -> tuple[int, ...]:
    """The rank of the smallest kept magnitude (1-based) per model; below 1 all are kept."""
    if rounding == "mergelm":
        return tuple(int(count * (1 - density)) for density in densities)
    return tuple(count - int(count * density) for density in densities)


def top_share(tensors: tuple[Tensor, ...], ranks: tuple[int, ...], kept: Kept) -> Steps:
    """Thresholds at ``ranks`` over all ``tensors`` together, for each model; 0 where nothing is trimmed."""
    wanted = [index for index, rank in enumerate(ranks) if rank >= 1]
    found = yield tuple(
        Rank(tuple(_kept_delta(tensor, index, kept) for tensor in tensors), ranks[index]) for index in wanted
    )
    bars = dict(zip(wanted, found, strict=True))
    return tuple(bars.get(index, 0.0) for index in range(len(ranks)))


def _kept_delta(tensor: Tensor, index: int, kept: Kept) -> Call:
    keep = kept(tensor)[index]
    if keep is True:
        return call(delta, base=tensor.base, model=tensor.models[index])
    return call(kept_delta, base=tensor.base, model=tensor.models[index], keep=keep)


def by_deviation(tensors: tuple[Tensor, ...], count: int, factor: float) -> Steps:
    """Keep |tau - mean| > factor * standard deviation (unbiased), per model."""
    size = len(tensors[0].models)
    sums = yield tuple(
        Totals(tuple(call(moments, base=tensor.base, model=tensor.models[index]) for tensor in tensors))
        for index in range(size)
    )
    means = [total / count for total, _ in sums]
    spreads = [
        sqrt(max(0.0, square - total * mean) / (count - 1)) for (total, square), mean in zip(sums, means, strict=True)
    ]
    bars = tuple(float(np.nextafter(np.float32(factor * spread), np.float32(np.inf))) for spread in spreads)
    return bars, tuple(means)


def by_mass(tensors: tuple[Tensor, ...], fraction: float) -> Steps:
    """The largest threshold at and above which lies ``fraction`` of the squared norm, per model.

    The bits of a magnitude are found three at a time, so the answer is exact.
    """
    thresholds = []
    for index in range(len(tensors[0].models)):
        threshold = yield from _mass_threshold(tensors, index, fraction)
        thresholds.append(threshold)
    return tuple(thresholds)


def _mass_threshold(tensors: tuple[Tensor, ...], index: int, fraction: float) -> Steps:
    found, goal = 0, None
    for shift in (30, 27, 24, 21, 18, 15, 12, 9, 6, 3, 0):
        bars = tuple(_magnitude(found + (step << shift)) for step in range(8))
        calls = tuple(
            call(mass_above, base=tensor.base, model=tensor.models[index], bars=bars[1:]) for tensor in tensors
        )
        if goal is None:
            whole = tuple(call(moments, base=tensor.base, model=tensor.models[index]) for tensor in tensors)
            above, (_, total) = yield (Totals(calls), Totals(whole))
            goal = fraction * total
        else:
            (above,) = yield (Totals(calls),)
        found += sum(mass >= goal for mass in above) << shift
    return _magnitude(found)


def _magnitude(bits: int) -> float:
    """The float32 with these bits; beyond the largest finite one, infinity."""
    return float(np.uint32(min(bits, 0x7F800000)).view(np.float32))


# --- the paper's flavour --------------------------------------------------------------------------------


def select(tensors: tuple[Tensor, ...], view: Tensor | Model, kept: Kept) -> Steps:
    """(thresholds, centers) by the ``trim`` rule over ``tensors`` together."""
    zeros = (0.0,) * len(tensors[0].models)
    if view["trim"] == "std":
        return (yield from by_deviation(tensors, view.count, view["threshold"]))
    if view["trim"] == "nf":
        thresholds = yield from by_mass(tensors, view["threshold"])
        return thresholds, zeros
    if view["trim"] == "none":
        return zeros, zeros
    ranks = paper_ranks(view.count, view.each["density"], view["rounding"])
    thresholds = yield from top_share(tensors, ranks, kept)
    return thresholds, zeros


def survey(model: Model) -> Steps:
    """Whole-model thresholds, norms where the election needs them, and the majority sign."""
    if model["variant"] == "mergekit" or model["scope"] == "tensor":
        return None
    return (yield from know(model.tensors, model, nothing_dropped))


def know(tensors: tuple[Tensor, ...], view: Tensor | Model, kept: Kept) -> Steps:
    """What must be known before the first element: (thresholds, centers, norms, majority sign)."""
    size = len(tensors[0].models)
    thresholds, centers = yield from select(tensors, view, kept)
    norms = (1.0,) * size
    if view["sign"] in ("normfrac", "normmass"):
        squares = yield tuple(
            Totals(tuple(_kept_square(tensor, index, thresholds, centers) for tensor in tensors))
            for index in range(size)
        )
        norms = tuple(square or 1.0 for (square,) in squares)
    votes = tuple(
        call(
            vote, base=tensor.base, models=tensor.models, kept=kept(tensor), thresholds=thresholds,
            centers=centers, factors=view.each.get("weight", (1.0,) * size),
        )
        for tensor in tensors
    )  # fmt: skip
    ((balance,),) = yield (Totals(votes),)
    return thresholds, centers, norms, float(np.sign(balance))


def _kept_square(tensor: Tensor, index: int, thresholds: Any, centers: Any) -> Call:
    return call(
        kept_square, base=tensor.base, model=tensor.models[index], keep=True,
        threshold=thresholds[index], center=centers[index],
    )  # fmt: skip


def merge(tensor: Tensor) -> Steps:
    if not tensor.models:
        return Copy(tensor.base)  # type: ignore[arg-type]
    if tensor.variant == "mergekit":
        return (yield from merge_like_mergekit(tensor))
    known = tensor.survey
    if known is None:
        known = yield from know((tensor,), tensor, nothing_dropped)
    return aggregate(tensor, known, nothing_dropped(tensor), tensor.each["weight"])


def aggregate(tensor: Tensor, known: Any, kept: tuple[Any, ...], factors: tuple[float, ...]) -> Call:
    """The output of the paper's flavour, from what is known of the whole vector.

    ``factors`` multiply the values; the mean divides by the weights of those that agree.
    """
    thresholds, centers, norms, majority = known
    shared = {
        "base": tensor.base, "models": tensor.models, "kept": kept, "thresholds": thresholds, "centers": centers,
        "fallback": majority, "scale": tensor["lambda"],
    }  # fmt: skip
    limits = (INFINITY,) * len(tensor.models)
    rule, how = tensor["sign"], tensor["merge_func"]
    if rule == "mass" and how == "dis-mean":
        return call(ties_mean, limits=limits, factors=factors, weights=tensor.each["weight"], **shared)
    if rule == "mass" and how == "dis-sum":
        return call(ties_sum, limits=limits, factors=factors, **shared)
    return call(ties_general, norms=norms, oracle=_oracle(tensor), **_flags(rule, how), **shared)


def _oracle(tensor: Tensor) -> Any:
    return tensor.statistics["sign"][0] if tensor["sign"] == "oracle" else 0.0


def _flags(rule: str, how: str) -> dict[str, bool]:
    disjoint, _, kind = how.rpartition("-")
    return {
        "normmass": rule == "normmass", "normfrac": rule == "normfrac", "given": rule == "oracle",
        "elect": rule != "none", "take_max": kind == "max", "take_mean": kind == "mean",
        "take_sum": kind == "sum", "take_median": kind == "median", "disjoint": disjoint == "dis",
    }  # fmt: skip


# --- mergekit's flavour ---------------------------------------------------------------------------------


def merge_like_mergekit(tensor: Tensor) -> Steps:
    thresholds = yield from exact_share(tensor)
    chosen = selection(tensor, thresholds=thresholds)
    factors = yield from rescaled(tensor, chosen)
    return elected(tensor, chosen, factors)


def passes(parameters: dict[str, Any]) -> tuple[int, int]:
    """Whole-model and per-tensor passes over the data before the output is made."""
    if parameters.get("variant") == "mergekit":
        return 0, 1 + int(bool(parameters.get("rescale")))
    extra = 1 + (parameters["sign"] in ("normfrac", "normmass"))
    trim = {"none": 0, "std": 1, "nf": 11, "topk": 1}[parameters["trim"]]
    return (trim + extra, 0) if parameters["scope"] == "model" else (0, trim + extra)


CITATION = Citation(
    "TIES-Merging: resolving interference when merging models", "Yadav et al.", "NeurIPS 2023",
    "https://arxiv.org/abs/2306.01708",
)  # fmt: skip

_PAPER, _MERGEKIT = ("variant", ("paper",)), ("variant", ("mergekit",))

#: What only the paper's flavour takes.
PAPER_ONLY = (
    SCOPE,
    EXCLUDE,
    Parameter("trim", "str", "topk", "what to keep: the largest share, above c deviations, a share of the mass",
              choices=("topk", "std", "nf", "none"), mergekit=False, when=_PAPER),
    Parameter("threshold", "float", 0.0, "c of trim: std, share of squared mass of trim: nf", low=0, mergekit=False,
              when=("trim", ("std", "nf"))),
    Parameter("rounding", "str", "ge", "rank of the threshold: d - int(d k), or MergeLM's int(d (1 - k))",
              choices=("ge", "mergelm"), mergekit=False, when=("trim", ("topk",))),
    Parameter("sign", "str", "mass", "how the sign is elected",
              choices=("mass", "normfrac", "normmass", "oracle", "none"), mergekit=False, when=_PAPER),
    Parameter("merge_func", "str", "dis-mean", "what becomes of the values",
              choices=("dis-mean", "dis-sum", "dis-max", "mean", "sum", "median", "magnitude"), mergekit=False,
              when=_PAPER),
)  # fmt: skip

METHODS = (
    Method(
        name="ties",
        title="TIES-Merging",
        summary="trim, elect sign, disjoint merge of task vectors",
        advice="For fine-tunes that interfere (sign conflicts above 30 %): density 0.2, lambda 1.",
        citation=CITATION,
        merge=merge,
        survey=survey,
        passes=passes,
        searches=lambda tensor: tensor.size,
        min_models=0,
        parameters=(
            weight_parameter(defaults=(("paper", 1.0),)),
            Parameter("density", "float", 1.0, "share of each task vector that is kept", per_model=True,
                      low=0, high=1, defaults=(("paper", 0.2),)),
            LAMBDA,
            Parameter("normalize", "bool", True, "divide by the weights that agree", when=_MERGEKIT),
            Parameter("rescale", "bool", False, "match the L1 norm of the task vector after trimming",
                      when=_MERGEKIT),
            INT8_MASK,
            *PAPER_ONLY,
        ),
        statistics=(Statistic("sign", when=("sign", ("oracle",)), single=True, signed=True),),
        variants=("paper", "mergekit"),
    ),
)  # fmt: skip

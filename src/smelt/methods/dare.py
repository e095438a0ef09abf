"""DARE: drop a random share of each task vector, rescale the rest, then merge.

Yu et al., "Language models are super Mario: absorbing abilities from homologous models as a free lunch",
ICML 2024, https://arxiv.org/abs/2311.03099. Per tensor and model:

1. x = theta_i - theta_0 (``weight_format: finetuned`` takes theta_i itself, the ablation that fails);
2. drop each element with probability p = ``drop_rate`` (``mask_strategy: magnitude``: drop all up to the
   int(n p)-th smallest |x|);
3. multiply the survivors by 1 / (1 - p) unless ``rescale`` is off;
4. merge the thinned models: ``merge: average | task_arithmetic | ties | fisher | regmean | none``.

``dare_linear`` and ``dare_ties`` are the merges that mergekit calls so: drop, then task arithmetic or TIES
without trimming. Their ``variant: mergekit`` rescales each tensor to its L1 norm before the drop, which is
a random factor for the whole tensor, where the paper multiplies by 1 / (1 - p).

Draws are independent per model and counter-based (:mod:`smelt.kernels.random`); masks may be handed in.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import UsageError
from ..kernels.program import Call, Copy, Rank, Whole, call
from ..kernels.vocabulary import where
from . import ties
from .family import INFINITY, Selection, add_selected, added, elected, rescaled, selection
from .fisher import normalised
from .registry import EXCLUDE, LAMBDA, REQUIRED, Citation, Method, Parameter, Statistic, Steps, weight_parameter
from .regmean import regression_mean
from .task_arithmetic import INT8_MASK
from .tensors import Model, Tensor, delta, identity

# --- the element formulas: thresholds are 0 unless small magnitudes are dropped ---------------------------


def thinned_delta(base: Any, model: Any, keep: Any, threshold: Any, factor: Any) -> Any:
    x = model - base
    return where(keep & (abs(x) >= threshold), factor * x, 0)


def thinned(base: Any, model: Any, keep: Any, threshold: Any, factor: Any) -> Any:
    return base + thinned_delta(base, model, keep, threshold, factor)


def thinned_weight(model: Any, keep: Any, threshold: Any, factor: Any) -> Any:
    return where(keep & (abs(model) >= threshold), factor * model, 0)


def mean_thinned_weights(models: Any, kept: Any, thresholds: Any, factors: Any, scale: Any) -> Any:
    total = 0
    for model, keep, threshold, factor in zip(models, kept, thresholds, factors):  # noqa: B905
        total += thinned_weight(model, keep, threshold, factor)
    return scale * total


def fisher_thinned(
    base: Any,
    models: Any,
    kept: Any,
    thresholds: Any,
    factors: Any,
    fishers: Any,
    coefficients: Any,
    minimal: Any,
) -> Any:
    total = 0
    mass = 0
    for model, keep, threshold, factor, fisher, coefficient in zip(  # noqa: B905
        models, kept, thresholds, factors, fishers, coefficients
    ):
        precision = coefficient * (fisher + minimal)
        total += precision * thinned(base, model, keep, threshold, factor)
        mass += precision
    return total / mass


# --- the paper's flavour --------------------------------------------------------------------------------


def merge(tensor: Tensor) -> Steps:
    rates = tensor.each["drop_rate"]
    kept = draws(tensor)
    thresholds = yield from magnitude_bars(tensor, rates)
    factors = tuple(1 / (1 - rate) if tensor["rescale"] and rate < 1 else 1.0 for rate in rates)
    if tensor["merge"] == "ties":
        return ties.aggregate(_as_ties(tensor), tensor.survey, kept, factors)
    chosen = {"kept": kept, "thresholds": thresholds, "factors": factors}
    if tensor["weight_format"] == "finetuned":
        return _merge_weights(tensor, chosen)
    return _merge_deltas(tensor, chosen)


def draws(tensor: Tensor) -> tuple[Any, ...]:
    """What is kept at random; with magnitudes nothing is left to chance."""
    if tensor["mask_strategy"] == "magnitude":
        return (True,) * len(tensor.models)
    return tensor.kept(tuple(1 - rate for rate in tensor.each["drop_rate"]))


def magnitude_bars(tensor: Tensor, rates: tuple[float, ...]) -> Steps:
    """The smallest magnitude kept per model: above the int(n p)-th smallest, ties dropped."""
    if tensor["mask_strategy"] != "magnitude":
        return (0.0,) * len(rates)
    ranks = {i: int(tensor.count * rate) for i, rate in enumerate(rates) if int(tensor.count * rate) > 0}
    found = yield tuple(Rank((_ranked(tensor, i),), rank) for i, rank in ranks.items())
    bars = {i: float(np.nextafter(np.float32(bar), np.float32(np.inf))) for i, bar in zip(ranks, found, strict=True)}
    return tuple(bars.get(i, 0.0) for i in range(len(rates)))


def _ranked(tensor: Tensor, index: int) -> Call:
    if tensor["weight_format"] == "finetuned":
        return call(identity, x=tensor.models[index])
    return call(delta, base=tensor.base, model=tensor.models[index])


def _merge_deltas(tensor: Tensor, chosen: dict[str, Any]) -> Call | Whole:
    how, size = tensor["merge"], len(tensor.models)
    if how == "fisher":
        coefficients = tensor.survey
        return call(
            fisher_thinned, base=tensor.base, models=tensor.models, **chosen,
            fishers=tensor.statistics["fisher"], coefficients=coefficients, minimal=tensor["fisher_floor"],
        )  # fmt: skip
    if how == "regmean" and "gram" in tensor.statistics:
        return Whole(_regmean_thinned, {
            "base": tensor.base, "models": tensor.models, **chosen, "grams": tensor.statistics["gram"],
            "ratio": tensor["reduce_non_diagonal_ratio"],
        })  # fmt: skip
    scale = tensor["lambda"] if how == "task_arithmetic" else 1.0 / size
    limits = (INFINITY,) * size
    return call(add_selected, base=tensor.base, models=tensor.models, limits=limits, scale=scale, **chosen)


def _merge_weights(tensor: Tensor, chosen: dict[str, Any]) -> Call:
    if tensor["merge"] not in ("average", "none"):
        raise UsageError("dare: weight_format finetuned goes with merge: average or none only")
    scale = 1.0 / len(tensor.models)
    return call(mean_thinned_weights, models=tensor.models, scale=scale, **chosen)


def _regmean_thinned(base: Any, models: Any, kept: Any, thresholds: Any, factors: Any, grams: Any, ratio: float) -> Any:
    thin = tuple(
        thinned(base, model, keep, np.float32(threshold), np.float32(factor))
        for model, keep, threshold, factor in zip(models, kept, thresholds, factors, strict=True)
    )
    return regression_mean(thin, grams, ratio)


def survey(model: Model) -> Steps:
    """Whole-model thresholds for TIES, coefficients for Fisher."""
    _check(model)
    if model["merge"] == "ties":
        views = tuple(_as_ties(tensor) for tensor in model.tensors)
        return (yield from ties.know(views, Model(views), draws))
    if model["merge"] == "fisher":
        coefficients = model.each["coefficient"]
        if not model["normalize_fishers"]:
            return coefficients
        return (yield from normalised(model.tensors, coefficients, model["fisher_floor"]))
    return None


def _check(model: Model) -> None:
    if model["merge"] == "none" and model.size != 1:
        raise UsageError(f"dare: merge: none thins one model, {model.size} were given")


def _as_ties(tensor: Tensor) -> Tensor:
    """The same tensor with the parameters that TIES looks at."""
    from dataclasses import replace

    shared = {
        **tensor.shared, "trim": "topk", "sign": "mass", "merge_func": tensor["merge_func"],
        "rounding": tensor["rounding"], "scope": "model",
    }  # fmt: skip
    size = len(tensor.models)
    each = {**tensor.each, "density": (tensor["top_k"],) * size, "weight": (1.0,) * size}
    return replace(tensor, shared=shared, each=each)


def searches(tensor: Tensor) -> int:
    return tensor.size if tensor["mask_strategy"] == "magnitude" or tensor["merge"] == "ties" else 0


def passes(parameters: dict[str, Any]) -> tuple[int, int]:
    whole = {"ties": 2, "fisher": 1}.get(parameters["merge"], 0)
    return whole, 1 if parameters["mask_strategy"] == "magnitude" else 0


# --- mergekit's two methods -----------------------------------------------------------------------------


def merge_linear(tensor: Tensor) -> Steps:
    if not tensor.models:
        return Copy(tensor.base)  # type: ignore[arg-type]
    chosen = _selected(tensor)
    factors = yield from _factors(tensor, chosen)
    return added(tensor, chosen, factors)


def merge_ties(tensor: Tensor) -> Steps:
    if not tensor.models:
        return Copy(tensor.base)  # type: ignore[arg-type]
    chosen = _selected(tensor)
    factors = yield from _factors(tensor, chosen)
    return elected(tensor, chosen, factors)


def _selected(tensor: Tensor) -> Selection:
    """Draws, and thresholds that only say: a density of 0 keeps nothing."""
    densities = tensor.each["density"]
    kept = tensor.kept(tuple(density if density > 0 else 1.0 for density in densities))
    return selection(tensor, kept, tuple(0.0 if density > 0 else INFINITY for density in densities))


def _factors(tensor: Tensor, chosen: Selection) -> Steps:
    """Weight times the rescaling of the survivors: 1 / density, or mergekit's match of the L1 norm."""
    weights, densities = tensor.each["weight"], tensor.each["density"]
    if tensor.variant == "mergekit":
        return (yield from rescaled(tensor, chosen))
    if not tensor["rescale"]:
        return weights
    return tuple(w / density if density > 0 else w for w, density in zip(weights, densities, strict=True))


CITATION = Citation(
    "Language models are super Mario: absorbing abilities from homologous models as a free lunch", "Yu et al.",
    "ICML 2024", "https://arxiv.org/abs/2311.03099",
)  # fmt: skip

_DROP = (
    weight_parameter(),
    Parameter("density", "float", 1.0, "probability that an element of the task vector is kept", per_model=True,
              low=0, high=1),
    LAMBDA,
    Parameter("rescale", "bool", True, "rescale the survivors: 1 / density, or mergekit's L1 match"),
    INT8_MASK,
    EXCLUDE,
)  # fmt: skip

METHODS = (
    Method(
        name="dare",
        title="DARE, drop and rescale",
        summary="thin each task vector at random, then merge",
        advice="For ordinary fine-tunes (|delta| below 0.005): drop_rate 0.5-0.9. Not after continued pre-training.",
        citation=CITATION,
        merge=merge,
        survey=survey,
        passes=passes,
        searches=searches,
        random=True,
        keeps_excluded="model",
        parameters=(
            Parameter("drop_rate", "float", REQUIRED, "share of each task vector that is dropped", per_model=True,
                      low=0, high=1, mergekit=False),
            Parameter("rescale", "bool", True, "multiply the survivors by 1 / (1 - drop_rate)"),
            Parameter("mask_strategy", "str", "random", "what is dropped",
                      choices=("random", "magnitude"), mergekit=False),
            Parameter("weight_format", "str", "delta", "what is thinned: the task vector, or the weights",
                      choices=("delta", "finetuned"), mergekit=False),
            Parameter("merge", "str", "average", "how the thinned models are merged",
                      choices=("average", "task_arithmetic", "ties", "fisher", "regmean", "none"), mergekit=False),
            Parameter("lambda", "float", 1.0, "factor of the merged task vector",
                      when=("merge", ("task_arithmetic", "ties"))),
            EXCLUDE,
            Parameter("top_k", "float", 0.2, "share kept by the trim", low=0, high=1, mergekit=False,
                      when=("merge", ("ties",))),
            Parameter("merge_func", "str", "dis-mean", "what becomes of the values",
                      choices=("dis-mean", "dis-sum"), mergekit=False, when=("merge", ("ties",))),
            Parameter("rounding", "str", "ge", "rank of the threshold",
                      choices=("ge", "mergelm"), mergekit=False, when=("merge", ("ties",))),
            Parameter("coefficient", "float", 1.0, "factor of each model", per_model=True,
                      low=0, mergekit=False, when=("merge", ("fisher",))),
            Parameter("normalize_fishers", "bool", True, "divide by the norm of each Fisher",
                      mergekit=False, when=("merge", ("fisher",))),
            Parameter("fisher_floor", "float", 1e-6, "added to each Fisher", low=0, mergekit=False,
                      when=("merge", ("fisher",))),
            Parameter("reduce_non_diagonal_ratio", "float", 0.9, "factor off the diagonal",
                      low=0, high=1, mergekit=False, when=("merge", ("regmean",))),
        ),
        statistics=(
            Statistic("fisher", when=("merge", ("fisher",))),
            Statistic("gram", "square", when=("merge", ("regmean",)), partial=True, signed=True),
        ),
    ),
    Method(
        name="dare_linear",
        title="DARE + task arithmetic",
        summary="drop and rescale, then add task vectors",
        advice="As task_arithmetic, for several ordinary fine-tunes; density 0.3-0.7.",
        citation=CITATION,
        merge=merge_linear,
        passes=lambda parameters: (0, int(parameters.get("variant") == "mergekit" and parameters["rescale"])),
        random=True,
        min_models=0,
        parameters=(
            *_DROP,
            Parameter("normalize", "bool", False, "divide by the sum of the weights"),
        ),
        variants=("paper", "mergekit"),
    ),
    Method(
        name="dare_ties",
        title="DARE + TIES election",
        summary="drop and rescale, elect signs, merge what agrees",
        advice="As dare_linear where signs conflict; the sum is not a mean unless normalize is set.",
        citation=CITATION,
        merge=merge_ties,
        passes=lambda parameters: (0, int(parameters.get("variant") == "mergekit" and parameters["rescale"])),
        random=True,
        min_models=0,
        parameters=(
            *_DROP,
            Parameter("normalize", "bool", False, "divide by the weights that agree"),
        ),
        variants=("paper", "mergekit"),
    ),
)  # fmt: skip

"""OTA-merging: task vectors weighted, element by element, by the curvature that Adam has left behind.

Mahdavinia, Mahdavi, Mireshghallah, Mahdavi, "Harnessing optimization dynamics for curvature-informed model
merging", 2025, https://arxiv.org/abs/2509.11167. With v_i Adam's second moment (``statistics``), per tensor:

1. v_i may be compressed to rank one or ``rank`` (``rank1_approx``, ``rank``);
2. mask: m_i = [v_i tau_i^2 >= ``precond_threshold``], tau_i = theta_i - theta_0; without a base [v_i >= it];
3. weight: P_i = m_i (v_i^power scaling_factor_i + epsilon);
4. theta = theta_0 + sum_i P_i tau_i / sum_i P_i; without a base sum_i P_i theta_i / sum_i P_i.
   ``masked_task_vector_merge_method``: ``linear`` takes the mean of the m_i tau_i, ``ties`` trims them, elects
   a sign and takes the mean over all models of what agrees;
5. what is masked in every model takes the mean of the models, or the base (``fallback_to_base``).

``rescale`` gives m_i tau_i the operator norm that tau_i has. ``normalise`` divides v_i^power by its mean over the
tensor (``global``, as the code calls it) or v_i by its mean over the model (``model``): moments of models
trained with other batch sizes are not on one scale. ``batch_size`` multiplies v_i where it is known.

Where all weights vanish the kept models count alike: what an ``epsilon`` tends to that tends to 0, so 0 is
the default. The flavour ``ota-merge`` is the authors' code: epsilon 1e-8; masked means that the weights sum
up to 1.1 N epsilon at most; ``linear`` and ``ties`` see the mask only where ``rescale`` applies it.
"""

from __future__ import annotations

from typing import Any

from ..errors import UsageError
from ..kernels.program import Call, Copy, Operand, Rank, Totals, call
from ..kernels.vocabulary import where
from .curvature import CITATION, CURVATURE, compressed, digits_of, powered, restored, saliency
from .linear import weighted_sum
from .registry import EXCLUDE, Method, Parameter, Steps
from .tensors import Model, Tensor

# --- the element formulas: ``anchor`` is the base, else the first model -------------------------------------


def kept(anchor: Any, model: Any, curvature: Any, threshold: Any, by_saliency: bool) -> Any:
    score = curvature
    if by_saliency:
        score = saliency(anchor, model, curvature)
    return score >= threshold


def masked_delta(base: Any, model: Any, curvature: Any, threshold: Any) -> Any:
    return where(kept(base, model, curvature, threshold, True), model - base, 0)


def task_vector(
    anchor: Any, model: Any, curvature: Any, threshold: Any, ratio: Any, by_saliency: bool, bare: bool
) -> Any:
    """tau, masked unless ``bare``, rescaled."""
    keep = kept(anchor, model, curvature, threshold, by_saliency)
    return where(keep | bare, ratio * (model - anchor), 0)


def weight_of(keep: Any, curvature: Any, factor: Any, digits: Any, epsilon: Any) -> Any:
    return where(keep, factor * powered(curvature, digits) + epsilon, 0)


def settled(
    anchor: Any, models: Any, curvatures: Any, thresholds: Any, factors: Any, digits: Any, epsilon: Any, bar: Any,
    share: Any, by_saliency: bool, merged: Any,
) -> Any:  # fmt: skip
    """``merged``; ``share`` of the plain sum where no model is kept or the weights sum up to ``bar`` at most."""
    some = 0
    mass = 0
    plain = 0
    for model, curvature, threshold, factor in zip(models, curvatures, thresholds, factors):  # noqa: B905
        keep = kept(anchor, model, curvature, threshold, by_saliency)
        some += where(keep, 1, 0)
        mass += weight_of(keep, curvature, factor, digits, epsilon)
        plain += model - anchor
    return anchor + where((some == 0) | (mass <= bar), share * plain, merged)


def preconditioned(
    anchor: Any, models: Any, curvatures: Any, thresholds: Any, ratios: Any, factors: Any, digits: Any, epsilon: Any,
    bar: Any, share: Any, by_saliency: bool, bare: bool,
) -> Any:  # fmt: skip
    total = 0
    mass = 0
    alike = 0
    some = 0
    for model, curvature, threshold, ratio, factor in zip(  # noqa: B905
        models, curvatures, thresholds, ratios, factors
    ):
        keep = kept(anchor, model, curvature, threshold, by_saliency)
        weight = weight_of(keep, curvature, factor, digits, epsilon)
        tau = task_vector(anchor, model, curvature, threshold, ratio, by_saliency, bare)
        total += weight * tau
        mass += weight
        alike += where(keep, tau, 0)
        some += where(keep, 1, 0)
    merged = where(mass > 0, total / where(mass > 0, mass, 1), alike / where(some > 0, some, 1))
    return settled(anchor, models, curvatures, thresholds, factors, digits, epsilon, bar, share, by_saliency, merged)


def mean_of_masked(
    anchor: Any, models: Any, curvatures: Any, thresholds: Any, ratios: Any, factors: Any, digits: Any, epsilon: Any,
    bar: Any, share: Any, by_saliency: bool, bare: bool,
) -> Any:  # fmt: skip
    total = 0
    count = 0
    for model, curvature, threshold, ratio in zip(models, curvatures, thresholds, ratios):  # noqa: B905
        total += task_vector(anchor, model, curvature, threshold, ratio, by_saliency, bare)
        count += 1
    merged = total / count
    return settled(anchor, models, curvatures, thresholds, factors, digits, epsilon, bar, share, by_saliency, merged)


def mean_of_elected(
    anchor: Any, models: Any, curvatures: Any, thresholds: Any, ratios: Any, trims: Any, factors: Any, digits: Any,
    epsilon: Any, bar: Any, share: Any, by_saliency: bool, bare: bool,
) -> Any:  # fmt: skip
    vote = 0
    for model, curvature, threshold, ratio, trim in zip(  # noqa: B905
        models, curvatures, thresholds, ratios, trims
    ):
        tau = task_vector(anchor, model, curvature, threshold, ratio, by_saliency, bare)
        vote += where(abs(model - anchor) >= trim, tau, 0)
    direction = where(vote >= 0, 1, -1)
    total = 0
    count = 0
    for model, curvature, threshold, ratio, trim in zip(  # noqa: B905
        models, curvatures, thresholds, ratios, trims
    ):
        tau = task_vector(anchor, model, curvature, threshold, ratio, by_saliency, bare)
        total += where((abs(model - anchor) >= trim) & (tau * direction > 0), tau, 0)
        count += 1
    merged = total / count
    return settled(anchor, models, curvatures, thresholds, factors, digits, epsilon, bar, share, by_saliency, merged)


def raised(curvature: Any, digits: Any) -> Any:
    return (powered(curvature, digits),)


def measured(x: Any) -> Any:
    return (x,)


# --- one tensor ---------------------------------------------------------------------------------------------


def merge(tensor: Tensor) -> Steps:
    if "exp_avg_sq" not in tensor.statistics:
        return _uncovered(tensor)
    curvatures = yield from compressed(
        tensor.statistics["exp_avg_sq"], tensor.each["rank1_approx"], tensor.each["rank"]
    )
    factors = yield from _factors(tensor, curvatures)
    thresholds, size = tensor.each["precond_threshold"], len(tensor.models)
    ratios = yield from _ratios(tensor, curvatures, thresholds)
    theirs = tensor.variant == "ota-merge"
    shared = {
        "anchor": tensor.base or tensor.models[0], "models": tensor.models, "curvatures": curvatures,
        "thresholds": thresholds, "ratios": ratios, "factors": factors, "digits": digits_of(tensor["power"]),
        "epsilon": tensor["epsilon"], "by_saliency": tensor.base is not None,
        "bar": 1.1 * size * tensor["epsilon"] if theirs and any(thresholds) else -1.0,
        "bare": theirs and not tensor["rescale"], "share": 0.0 if tensor["fallback_to_base"] else 1.0 / size,
    }  # fmt: skip
    how = tensor["masked_task_vector_merge_method"]
    if how == "ties":
        trims = yield from _trims(tensor, curvatures, thresholds, shared["bare"])
        return call(mean_of_elected, trims=trims, **shared)
    return call(mean_of_masked if how == "linear" else preconditioned, **shared)


def _uncovered(tensor: Tensor) -> Call | Copy:
    """A tensor without curvature."""
    if tensor["missing"] == "base":
        assert tensor.base is not None
        return Copy(tensor.base)
    size = len(tensor.models)
    return call(weighted_sum, models=tensor.models, weights=(1.0 / size,) * size)


def _factors(tensor: Tensor, curvatures: tuple[Operand, ...]) -> Steps:
    """What the powers are multiplied by."""
    scales = [scale * known for scale, known in zip(tensor.each["scaling_factor"], tensor.survey, strict=True)]
    if tensor["normalise"] != "global":
        return tuple(scales)
    digits = digits_of(tensor["power"])
    sums = yield tuple(Totals((call(raised, curvature=curvature, digits=digits),)) for curvature in curvatures)
    means = [scale * total / tensor.count for scale, (total,) in zip(scales, sums, strict=True)]
    below = [mean + tensor["epsilon"] for mean in means]
    return tuple(scale / low if low > 0 else 0.0 for scale, low in zip(scales, below, strict=True))


def _ratios(tensor: Tensor, curvatures: tuple[Operand, ...], thresholds: tuple[float, ...]) -> Steps:
    if not tensor["rescale"]:
        return (1.0,) * len(curvatures)
    steps = 10 if tensor["approximate_norm"] else 64
    return (
        yield from restored(tensor, curvatures, thresholds, masked_delta, tensor["rescale_relative_threshold"], steps)
    )


def _trims(tensor: Tensor, curvatures: tuple[Operand, ...], thresholds: tuple[float, ...], bare: bool) -> Steps:
    """The smallest |tau| that ``ties`` keeps of each (masked) task vector; equal ones are all kept."""
    keep = int(tensor["ties_density"] * tensor.count)
    if not keep:
        return (float("inf"),) * len(curvatures)
    ranked = tuple(
        call(
            task_vector, anchor=tensor.base, model=model, curvature=curvature, threshold=threshold, ratio=1.0,
            by_saliency=True, bare=bare,
        )
        for model, curvature, threshold in zip(tensor.models, curvatures, thresholds, strict=True)
    )  # fmt: skip
    bars = yield tuple(Rank((each,), tensor.count - keep + 1) for each in ranked)
    return tuple(bars)


# --- the whole model ----------------------------------------------------------------------------------------


def survey(model: Model) -> Steps:
    """Per model, what v^power is multiplied by for the batch size and the mean of v over the model."""
    _check(model)
    sizes, power = model.each["batch_size"], model["power"]
    if model["normalise"] != "model":
        return tuple(size**power for size in sizes)
    known = [tensor for tensor in model.tensors if "exp_avg_sq" in tensor.statistics]
    count = sum(tensor.count for tensor in known)
    sums = yield tuple(
        Totals(tuple(call(measured, x=tensor.statistics["exp_avg_sq"][index]) for tensor in known))
        for index in range(model.size)
    )
    means = [total / count for (total,) in sums]
    return tuple((size / mean) ** power if mean > 0 else 0.0 for size, mean in zip(sizes, means, strict=True))


def _check(model: Model) -> None:
    """Choices that need a base."""
    if model.tensors[0].base is not None:
        return
    how = model["masked_task_vector_merge_method"]
    chosen = {
        "fallback_to_base": model["fallback_to_base"], "rescale": model["rescale"], "missing: base":
        model["missing"] == "base", f"masked_task_vector_merge_method: {how}": how != "precond",
    }  # fmt: skip
    UsageError.gather(f"ota: {what} needs a base model: add base_model" for what, given in chosen.items() if given)


def passes(parameters: dict[str, Any]) -> tuple[int, int]:
    each = (parameters["normalise"] == "global") + (parameters["masked_task_vector_merge_method"] == "ties")
    steps = 10 if parameters["approximate_norm"] else 30
    return int(parameters["normalise"] == "model"), each + steps * bool(parameters["rescale"])


_RESCALED = ("rescale", (True,))

METHODS = (
    Method(
        name="ota",
        title="OTA-merging",
        summary="task vectors weighted and masked by Adam's second moment",
        advice="For fine-tunes of one base whose optimizer states were kept; power 0.5 with thresholds, 1 without.",
        citation=CITATION,
        merge=merge,
        survey=survey,
        passes=passes,
        searches=lambda tensor: tensor.size if tensor["masked_task_vector_merge_method"] == "ties" else 0,
        base="optional",
        parameters=(
            Parameter("power", "float", 0.5, "exponent of the curvature, in steps of 2^-24", low=0, high=16,
                      open_low=True, mergekit=False),
            Parameter("epsilon", "float", 0.0, "added to each weight, in its own units", low=0, mergekit=False,
                      defaults=(("ota-merge", 1e-8),)),
            Parameter("precond_threshold", "float", 0.0, "least v tau^2 (without a base: v) that is kept; 0: all",
                      per_model=True, low=0, mergekit=False),
            Parameter("scaling_factor", "float", 1.0, "factor of each model's weights", per_model=True, low=0,
                      mergekit=False),
            Parameter("batch_size", "float", 1.0, "examples per step in training: v is multiplied by it",
                      per_model=True, low=0, open_low=True, mergekit=False),
            Parameter("normalise", "str", "none", "divide v^power by its mean over the tensor, or v by the model's",
                      choices=("none", "global", "model"), mergekit=False),
            Parameter("fallback_to_base", "bool", False, "what is masked everywhere takes the base, not the mean",
                      mergekit=False),
            Parameter("masked_task_vector_merge_method", "str", "precond", "how masked task vectors are merged",
                      choices=("precond", "linear", "ties"), mergekit=False),
            Parameter("ties_density", "float", 1.0, "share of each task vector that is kept", low=0, high=1,
                      mergekit=False, when=("masked_task_vector_merge_method", ("ties",))),
            Parameter("rescale", "bool", False, "give the masked task vector the operator norm of the whole one",
                      mergekit=False),
            Parameter("approximate_norm", "bool", False, "stop after 10 steps", mergekit=False, when=_RESCALED),
            Parameter("rescale_relative_threshold", "float", 1e-6, "share of the norm below which a rest counts as 0",
                      low=0, high=1, mergekit=False, when=_RESCALED),
            Parameter("rank1_approx", "bool", False, "curvature of matrices from its sums of rows and columns",
                      per_model=True, mergekit=False),
            Parameter("rank", "int", 0, "curvature of matrices truncated to this rank; 0: whole", per_model=True,
                      low=0, mergekit=False),
            Parameter("missing", "str", "error", "tensors without curvature: refuse, plain mean, or the base's",
                      choices=("error", "mean", "base"), mergekit=False),
            EXCLUDE,
        ),
        statistics=(CURVATURE,),
        variants=("paper", "ota-merge"),
    ),
)  # fmt: skip

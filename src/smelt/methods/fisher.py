"""Fisher-weighted averaging: each parameter counts by how much its model's predictions depend on it.

Matena, Raffel, "Merging models with Fisher-weighted averaging", NeurIPS 2022,
https://arxiv.org/abs/2111.09832, equation 1, with a given diagonal Fisher F_j per model (``statistics``):

    theta = sum_j c_j F_j theta_j / sum_j c_j F_j

computed as theta_1 + sum_j c_j F_j (theta_j - theta_1) / sum_j c_j F_j, so that equal models give
themselves. ``normalize_fishers`` divides c_j by the norm of F_j over all merged tensors. F_j is at least
``fisher_floor``; with ``favor_target_model`` only that of the first model, the target, so that its value
stays where no model knows better. Where every weight vanishes the target's value is taken.

Flavours. ``mergelm`` adds the floor to all Fishers and, if asked to normalise, multiplies c_j by
q_j / sum q with q_j = 1 / (norm of F_j + floor). ``mergebench`` does so with a floor of 1e-10.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

from ..kernels.program import Call, Copy, Totals, call
from ..kernels.vocabulary import maximum, where
from .registry import EXCLUDE, Citation, Method, Parameter, Statistic, Steps, weight_parameter
from .tensors import Model, Tensor


def square(x: Any) -> Any:
    return (x * x,)


def weighted_by_fisher(models: Any, fishers: Any, coefficients: Any, floors: Any, added: Any) -> Any:
    target = models[0]
    total = 0
    mass = 0
    for model, fisher, coefficient, floor in zip(models, fishers, coefficients, floors):  # noqa: B905
        precision = coefficient * (maximum(fisher, floor) + added)
        total += precision * (model - target)
        mass += precision
    return target + where(mass > 0, total / where(mass > 0, mass, 1), 0)


def norms(tensors: tuple[Tensor, ...], size: int) -> Steps:
    """The L2 norm of each model's Fisher over all ``tensors`` that have one."""
    known = [tensor.statistics["fisher"] for tensor in tensors if "fisher" in tensor.statistics]
    squares = yield tuple(Totals(tuple(call(square, x=fishers[index]) for fishers in known)) for index in range(size))
    return [sqrt(total) for (total,) in squares]


def normalised(tensors: tuple[Tensor, ...], coefficients: tuple[float, ...], minimal: float) -> Steps:
    """The coefficients times each model's share of 1 / (||F_j|| + minimal), as MergeLM has it."""
    found = yield from norms(tensors, len(coefficients))
    inverse = [1.0 / (norm + minimal) if norm + minimal > 0 else 0.0 for norm in found]
    return tuple(c * q / (sum(inverse) or 1.0) for c, q in zip(coefficients, inverse, strict=True))


def survey(model: Model) -> Steps:
    """The coefficients of the models: one number each for all tensors."""
    weights = model.each["weight"]
    if not model["normalize_fishers"] or model["isotropic"]:
        return None
    if model["variant"] != "paper":
        return (yield from normalised(model.tensors, weights, model["fisher_floor"]))
    found = yield from norms(model.tensors, len(weights))
    return tuple(c / norm if norm > 0 else c for c, norm in zip(weights, found, strict=True))


def merge(tensor: Tensor) -> Call | Copy:
    weights = tensor.each["weight"]
    known = tensor.statistics.get("fisher")
    if known is None and not tensor["isotropic"] and tensor["missing"] == "target":
        return Copy(tensor.models[0])
    size = len(weights)
    if known is None:
        alike = {"fishers": (1.0,) * size, "coefficients": weights, "floors": (0.0,) * size, "added": 0.0}
        return call(weighted_by_fisher, models=tensor.models, **alike)
    floor = tensor["fisher_floor"]
    added = 0.0 if tensor.variant == "paper" else floor
    floored = 0 if added else 1 if tensor["favor_target_model"] else size
    return call(
        weighted_by_fisher, models=tensor.models, fishers=known, coefficients=tensor.survey or weights,
        floors=(floor,) * floored + (0.0,) * (size - floored), added=added,
    )  # fmt: skip


def passes(parameters: dict[str, Any]) -> tuple[int, int]:
    return int(parameters["normalize_fishers"] and not parameters["isotropic"]), 0


METHODS = (
    Method(
        name="fisher",
        title="Fisher merging",
        summary="average weighted by each model's Fisher information",
        advice="For fine-tunes whose diagonal Fisher was measured; the first model is favoured where none knows.",
        citation=Citation(
            "Merging models with Fisher-weighted averaging", "Matena, Raffel", "NeurIPS 2022",
            "https://arxiv.org/abs/2111.09832",
        ),
        merge=merge,
        survey=survey,
        passes=passes,
        base="ignored",
        keeps_excluded="model",
        parameters=(
            weight_parameter(1.0, low=0),
            Parameter("normalize_fishers", "bool", True, "divide by the norm of each Fisher",
                      mergekit=False, defaults=(("mergelm", False), ("mergebench", False))),
            Parameter("fisher_floor", "float", 1e-6, "least Fisher (mergelm, mergebench: added to it)", low=0,
                      mergekit=False, defaults=(("mergebench", 1e-10),)),
            Parameter("favor_target_model", "bool", True, "floor the first model's Fisher only", mergekit=False,
                      when=("variant", ("paper",))),
            Parameter("isotropic", "bool", False, "count all parameters alike, without statistics", mergekit=False),
            Parameter("missing", "str", "error", "tensors without a Fisher: refuse, mean, or the first model's",
                      choices=("error", "mean", "target"), mergekit=False),
            EXCLUDE,
        ),
        statistics=(Statistic("fisher", also=("exp_avg_sq",), factored=True, when=("isotropic", (False,))),),
        variants=("paper", "mergelm", "mergebench"),
    ),
)  # fmt: skip

"""DELLA: drop by the rank of magnitude, rescale what is left, elect signs, fuse.

Deep, Bhardwaj and Poria, "DELLA-Merging: reducing interference in model merging through magnitude-based
sampling", 2024, https://arxiv.org/abs/2406.11617. Per tensor, model and row (the last axis) of length L:

1. x = theta_i - theta_0; r = 0 .. L - 1 is the rank of |x| in its row, the smallest first;
2. keep x with probability P = (d - e) + 2 e r / (L - 1), d = ``density``, e = ``epsilon`` (d where L = 1);
3. divide what is kept by its own P (``rescale``);
4. elect signs by the weighted sums and average what agrees (``della``), or add (``della_linear``).

``sampling`` has the authors' other rules: the rank in the whole tensor (which is sorted in memory), the magnitude
between the row's least and largest instead of the rank, or simply the int(d L) largest of each row.

``variant: mergekit`` rescales a tensor as a whole to the L1 norm that it had, and takes axis 1 as the row of a
tensor of more than two axes. Of equal magnitudes the lower index has the lower rank. Draws are counter-based, one
stream per model and tensor; masks may be handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError, show
from ..kernels.program import ByRow, Call, Copy, row_length
from .family import Selection, added, elected, rescaled, selection
from .ranks import ranks
from .registry import EXCLUDE, LAMBDA, Citation, Method, Parameter, Steps, weight_parameter
from .task_arithmetic import INT8_MASK
from .tensors import Tensor

Array = npt.NDArray[Any]

# --- functions of rows: what each element is kept with, and multiplied by -----------------------------------


def by_rank(base: Array, model: Array, density: float, epsilon: float, stride: int) -> Array:
    """The keep probability by rank; elements that are ranked together lie ``stride`` apart in the row."""
    delta = (model - base).reshape(len(base), -1, stride).swapaxes(1, 2)
    last = delta.shape[-1] - 1
    share = ranks(delta) / last if last else np.full(delta.shape, 0.5)
    return (density - epsilon + 2 * epsilon * share).swapaxes(1, 2).reshape(base.shape)


def by_magnitude(base: Array, model: Array, density: float, epsilon: float) -> Array:
    """The keep probability by where |delta| lies between the least and the largest of the row."""
    size = abs(model - base)
    least, largest = size.min(axis=1, keepdims=True), size.max(axis=1, keepdims=True)
    share = (size - least) / (largest - least + 1e-7)
    return np.asarray(density - epsilon + 2 * epsilon * share)


def top_of_row(base: Array, model: Array, density: float) -> Array:
    """1 for the int(density L) largest |delta| of the row, else 0."""
    length = base.shape[1]
    return np.asarray(ranks(model - base) >= length - int(density * length))


def divided(weight: float, probability: Array) -> Array:
    """The weight over the keep probability; 0 for what is never kept."""
    return np.divide(weight, probability, out=np.zeros_like(probability), where=probability > 0)


# --- merging --------------------------------------------------------------------------------------------


def merge(tensor: Tensor) -> Steps | Copy:
    return _checked(tensor, elected)


def merge_linear(tensor: Tensor) -> Steps | Copy:
    return _checked(tensor, added)


Combine = Callable[[Tensor, Selection, tuple[Any, ...]], Call]


def _checked(tensor: Tensor, combine: Combine) -> Steps | Copy:
    """Refuse what cannot be a probability before any weight is read."""
    if not tensor.models:
        return Copy(tensor.base)  # type: ignore[arg-type]
    for density, epsilon in zip(tensor.each["density"], tensor.each["epsilon"], strict=True):
        inside = epsilon < density < 1 - epsilon
        if density < 1 and tensor["sampling"] != "top" and not inside:
            raise UsageError(
                f"della: tensor {show(tensor.name)}: density {density:g} with epsilon {epsilon:g} gives keep "
                f"probabilities {density - epsilon:g} to {density + epsilon:g}, expected inside (0, 1): lower epsilon"
            )
    return _merged(tensor, combine)


def _merged(tensor: Tensor, combine: Combine) -> Steps:
    probabilities = tuple(_probability(tensor, index) for index in range(len(tensor.models)))
    chosen = selection(tensor, tensor.kept(probabilities))
    if tensor.variant == "mergekit":
        factors = yield from rescaled(tensor, chosen)
    else:
        factors = _factors(tensor, probabilities)
    return combine(tensor, chosen, factors)


def _probability(tensor: Tensor, index: int) -> ByRow | float:
    """What the elements of one model are kept with."""
    density, rule, shape = tensor.each["density"][index], tensor["sampling"], tensor.shape
    if density >= 1:
        return 1.0
    given = {"base": tensor.base, "model": tensor.models[index], "density": density}
    if rule == "top":
        return ByRow(top_of_row, given, shape)
    given["epsilon"] = tensor.each["epsilon"][index]
    if rule == "magnitude":
        return ByRow(by_magnitude, given, shape)
    return ByRow(by_rank, {**given, "stride": prod(shape[2:]) if _along_axis_one(tensor) else 1}, _ranked(tensor))


def _along_axis_one(tensor: Tensor) -> bool:
    """mergekit's row of a tensor of more than two axes."""
    return tensor.variant == "mergekit" and len(tensor.shape) > 2


def _ranked(tensor: Tensor) -> tuple[int, ...]:
    """The shape whose last axis holds what is ranked together."""
    if tensor["sampling"] == "tensor_rank":
        return (tensor.count,)
    if _along_axis_one(tensor):
        return (tensor.shape[0], prod(tensor.shape[1:]))
    return tensor.shape


def holds(tensor: Tensor) -> tuple[int, int]:
    """A probability and a factor for each element of each model; sorting a whole tensor takes a copy or two."""
    return row_length(_ranked(tensor)), 8 * len(tensor.models) + (48 if tensor["sampling"] == "tensor_rank" else 0)


def _factors(tensor: Tensor, probabilities: tuple[ByRow | float, ...]) -> tuple[Any, ...]:
    """The weights, with ``rescale`` over the keep probabilities."""
    weights: tuple[float, ...] = tensor.each["weight"]
    if not tensor["rescale"]:
        return weights
    return tuple(
        ByRow(divided, {"weight": weight, "probability": chance}, chance.shape) if isinstance(chance, ByRow) else weight
        for weight, chance in zip(weights, probabilities, strict=True)
    )


CITATION = Citation(
    "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
    "Deep, Bhardwaj, Poria", "2024", "https://arxiv.org/abs/2406.11617",
)  # fmt: skip

_RANDOM = ("rank", "tensor_rank", "magnitude")

_PARAMETERS = (
    weight_parameter(defaults=(("paper", 1.0),)),
    Parameter("density", "float", 0.7, "mean probability that an element of the task vector is kept",
              per_model=True, low=0, high=1, defaults=(("mergekit", 1.0),)),
    Parameter("epsilon", "float", 0.07, "how far the probability departs from the density", per_model=True, low=0,
              defaults=(("mergekit", 0.15),), when=("sampling", _RANDOM)),
    LAMBDA,
    Parameter("rescale", "bool", True, "divide by the keep probability, or mergekit's L1 match of the tensor"),
    Parameter("sampling", "str", "rank", "what decides: the rank in the row or tensor, the magnitude, or the top alone",
              choices=(*_RANDOM, "top"), mergekit=False, when=("variant", ("paper",))),
    INT8_MASK,
    EXCLUDE,
)  # fmt: skip


def passes(parameters: dict[str, Any]) -> tuple[int, int]:
    return 0, int(parameters.get("variant") == "mergekit" and parameters["rescale"])


METHODS = (
    Method(
        name="della",
        title="DELLA",
        summary="drop by rank of magnitude, rescale, elect signs, average",
        advice="Like dare_ties, where small updates are noise: density 0.3-0.7, epsilon up to 0.15.",
        citation=CITATION,
        merge=merge,
        passes=passes,
        holds=holds,
        random=True,
        min_models=0,
        parameters=(*_PARAMETERS, Parameter("normalize", "bool", True, "divide by the weights that agree")),
        variants=("paper", "mergekit"),
    ),
    Method(
        name="della_linear",
        title="DELLA without election",
        summary="drop by rank of magnitude, rescale, add task vectors",
        advice="Like dare_linear, where small updates are noise and signs seldom conflict.",
        citation=CITATION,
        merge=merge_linear,
        passes=passes,
        holds=holds,
        random=True,
        min_models=0,
        parameters=(
            *_PARAMETERS,
            Parameter("normalize", "bool", True, "divide by the sum of the weights", defaults=(("mergekit", False),)),
        ),
        variants=("paper", "mergekit"),
    ),
)

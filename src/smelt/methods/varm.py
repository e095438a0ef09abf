"""VaRM: average the models, each weighted by how much it changed the base, unit by unit.

Wan et al., "FuseChat: knowledge fusion of chat models", first version, https://arxiv.org/abs/2402.16107.

    V_ig = mean over the elements of g of (theta_i - theta_0)^2,   w_ig = V_ig / sum_j V_jg
    theta = sum_i w_ig theta_i                                     for every element of the unit g

``granularity`` says what a unit is: an element, a matrix (any one tensor), a module, a layer, or the model. The
statistic of a module or layer is the sum of its tensors' means, so a norm counts as much as a matrix; tensors
outside of all layers are averaged evenly at that granularity. A unit that no model changed is averaged evenly.

Flavours. ``paper``: a model that left a unit alone has no say in it. ``reference`` is the authors' code, which
averages a matrix or module evenly as soon as one model left it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, fsum, isfinite
from typing import Any

from ..errors import UsageError
from ..kernels.program import Call, Totals, call
from ..kernels.vocabulary import where
from .linear import weighted_sum
from .registry import EXCLUDE, Citation, Method, Parameter, Steps
from .tensors import Model, Tensor

# --- the element formulas -------------------------------------------------------------------------------


def change(base: Any, model: Any, square: bool) -> Any:
    """|tau|, or tau^2."""
    size = abs(model - base)
    return size * size if square else size


def total_change(base: Any, model: Any, square: bool) -> Any:
    return (change(base, model, square),)


def average_by_element(base: Any, models: Any, square: bool) -> Any:
    """Each value counts by its own change; where nothing changed, the base stays."""
    total = 0
    mass = 0
    for model in models:
        weight = change(base, model, square)
        total += weight * (model - base)
        mass += weight
    return base + total / where(mass == 0, 1, mass)


# --- weights --------------------------------------------------------------------------------------------


def shares(values: Sequence[float]) -> tuple[float, ...]:
    """``values`` over their sum; even shares where that is zero, or not a number."""
    total = fsum(values)
    if not (isfinite(total) and total > 0):
        return (1 / len(values),) * len(values)
    return tuple(value / total for value in values)


def softmax(values: Sequence[float], temperature: float) -> tuple[float, ...]:
    """exp(v / temperature) over the sum of these; even shares where a value is not finite."""
    if not all(map(isfinite, values)):
        return shares((1.0,) * len(values))
    highest = max(values)
    return shares([exp((value - highest) / temperature) for value in values])


def weights_of(view: Tensor | Model, values: Sequence[float]) -> tuple[float, ...]:
    """The models' weights on one unit from their statistics on it."""
    falls_back = view["variant"] == "reference" and view["granularity"] in ("matrix", "module")
    if falls_back and 0.0 in values:
        values = (1.0,) * len(values)
    return softmax(values, view["temperature"]) if view["use_softmax"] else shares(values)


def unit_of(tensor: Tensor) -> str | None:
    """The model (""), layer or module that a tensor belongs to; None for a tensor outside of all layers.

    A module is what a layer is made of ("model.layers.0.mlp"); outside of layers it is whatever holds the
    tensor itself ("model.norm").
    """
    layer = None if tensor.role is None or tensor.role.layer is None else f"{tensor.role.stack}.{tensor.role.layer}"
    if tensor["granularity"] != "module":
        return "" if tensor["granularity"] == "model" else layer
    holder = tensor.name.rpartition(".")[0]
    return holder if layer is None else ".".join(holder.split(".")[: layer.count(".") + 2])


def survey(model: Model) -> Steps:
    """The weights of each unit that spans several tensors, by the unit's name."""
    tensors = [tensor for tensor in model.tensors if tensor.count]
    if model["granularity"] in ("element", "matrix") or not tensors:
        return None
    if model["granularity"] == "model":
        totals = yield tuple(Totals(tuple(_changes(tensor)[i] for tensor in tensors)) for i in range(model.size))
        return {"": weights_of(model, [total / model.count for (total,) in totals])}
    if model["granularity"] == "layer" and all(unit_of(tensor) is None for tensor in tensors):
        raise UsageError(
            "varm: granularity: layer: no tensor is known to belong to a layer: give config.json (config in memory) "
            "with the number of layers"
        )
    totals = yield tuple(Totals((changed,)) for tensor in tensors for changed in _changes(tensor))
    return _weights_by_unit(model, tensors, [total for (total,) in totals])


def _weights_by_unit(model: Model, tensors: list[Tensor], totals: list[float]) -> dict[str, tuple[float, ...]]:
    """From the total change of each tensor by each model in turn."""
    sums: dict[str, list[float]] = {}
    for number, tensor in enumerate(tensors):
        unit = unit_of(tensor)
        if unit is not None:
            so_far, changes = sums.get(unit, [0.0] * model.size), totals[number * model.size :]
            sums[unit] = [total + change / tensor.count for total, change in zip(so_far, changes, strict=False)]
    return {unit: weights_of(model, values) for unit, values in sums.items()}


def _changes(tensor: Tensor) -> list[Call]:
    square = tensor["statistic"] == "square"
    return [call(total_change, base=tensor.base, model=model, square=square) for model in tensor.models]


def merge(tensor: Tensor) -> Steps:
    if tensor["granularity"] == "element":
        square = tensor["statistic"] == "square"
        return call(average_by_element, base=tensor.base, models=tensor.models, square=square)
    weights = yield from _weights(tensor)
    return call(weighted_sum, models=tensor.models, weights=weights)


def _weights(tensor: Tensor) -> Steps:
    if tensor["granularity"] == "matrix":
        totals = yield tuple(Totals((changed,)) for changed in _changes(tensor))
        return weights_of(tensor, [total / tensor.count for (total,) in totals])
    unit = unit_of(tensor)
    return shares((1.0,) * len(tensor.models)) if unit is None else tensor.survey[unit]


def passes(parameters: dict[str, Any]) -> tuple[int, int]:
    return {"element": (0, 0), "matrix": (0, 1)}.get(parameters["granularity"], (1, 0))


METHODS = (
    Method(
        name="varm",
        title="VaRM: variation-ratio merge",
        summary="mean of the models, each weighted by how much it changed the base",
        advice="For fine-tunes of one base that learnt different amounts in different places.",
        citation=Citation(
            "FuseChat: knowledge fusion of chat models", "Wan et al.", "2024", "https://arxiv.org/abs/2402.16107"
        ),
        merge=merge,
        survey=survey,
        passes=passes,
        parameters=(
            Parameter("granularity", "str", "matrix", "what is weighted as one",
                      choices=("element", "matrix", "module", "layer", "model")),
            Parameter("statistic", "str", "square", "the change that counts: its square or its size",
                      choices=("square", "abs")),
            Parameter("use_softmax", "bool", False, "weights by softmax instead of proportional ones",
                      when=("granularity", ("matrix", "module", "layer", "model"))),
            Parameter("temperature", "float", 1.0, "the statistics are divided by it before the softmax", low=0,
                      open_low=True, when=("use_softmax", (True,))),
            EXCLUDE,
        ),
        variants=("paper", "reference"),
        keeps_excluded="first",
    ),
)  # fmt: skip

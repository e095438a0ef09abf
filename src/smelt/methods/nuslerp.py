"""NuSLERP: spherical interpolation of two models by weights, or of their task vectors, whole or in parts.

C. Goddard, mergekit (https://github.com/arcee-ai/mergekit), 2024; no paper. The arc is Shoemake's (1985):

    t = w_1 / (w_0 + w_1)                                  (1/2 where the weights cancel)
    out = [sin((1 - t) theta) x_0 + sin(t theta) x_1] / sin theta,   theta the angle between x_0 and x_1

The x_i are the models, or with a base the task vectors, and the base is added. There is no threshold above
which the interpolation is linear. ``axis`` says what the vectors are: whole tensors (``flat``), the rows along
the last axis (``last``: of a linear layer what leads to one output), or those along the first (``first``).
Vectors and scalars are one vector. Parallel and opposite vectors are interpolated linearly.

Flavours. ``paper``: a zero vector has no direction, so that the interpolation with it is linear. ``mergekit``:
norms count as at least 1e-7, which puts a zero vector at 90 degrees; the axis is said by two switches, of which
``nuslerp_row_wise`` means the first axis.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernels.broadcast import PerColumn, PerRow
from ..kernels.program import Rows, Whole
from .registry import Citation, Method, Parameter, Steps, weight_parameter
from .spherical import Floats, arc, column_products, combined, norms_of, products, row_products, vectors
from .task_arithmetic import add_task_vectors
from .tensors import Tensor


def merge(tensor: Tensor) -> Steps:
    t, floor, axis = share_of(tensor.each["weight"]), _floor(tensor), _axis(tensor)
    if axis == "first" and len(tensor.shape) > 2:
        return Whole(along_first_axis, {**vectors(tensor), "t": t, "floor": floor})
    factors: tuple[Any, ...]
    if axis == "flat":
        (gram,) = yield (products(tensor.models, tensor.base),)
        factors = tuple(map(float, arc(cosines(np.array(gram), floor), t)))
    else:
        first = axis == "first"
        (grams,) = yield (Rows(column_products if first else row_products, vectors(tensor), total=first),)
        spread = PerColumn if first else PerRow
        factors = tuple(spread(each, tensor.shape) for each in arc(cosines(grams, floor), t))
    return combined(tensor.models, factors, tensor.base)


def share_of(weights: tuple[float, ...]) -> float:
    """The second model's share of the way."""
    total = weights[0] + weights[1]
    return weights[1] / total if abs(total) >= 1e-6 else 0.5


def _floor(tensor: Tensor) -> float:
    return 1e-7 if tensor.variant == "mergekit" else 0.0


def _axis(tensor: Tensor) -> str:
    """What is interpolated: "flat", "last" or "first"."""
    if len(tensor.shape) < 2:
        return "flat"
    if tensor.variant != "mergekit":
        return str(tensor["axis"])
    if tensor["nuslerp_flatten"]:
        return "flat"
    return "first" if tensor["nuslerp_row_wise"] else "last"


def cosines(grams: Floats, floor: float) -> Floats:
    """The cosine between two vectors, (...) from (..., 2, 2); no number where a norm is 0 and there is no floor."""
    norms = np.maximum(norms_of(grams), floor)
    with np.errstate(all="ignore"):
        return np.asarray(grams[..., 0, 1] / (norms[..., 0] * norms[..., 1]))


def along_first_axis(models: tuple[Any, ...], t: float, floor: float, base: Any = None) -> Any:
    """A tensor of more than two axes: its columns are the vectors along the first one."""
    shape, kind = models[0].shape, models[0].dtype
    x = tuple(model.reshape(len(model), -1) for model in models)
    origin = np.zeros((), kind) if base is None else base.reshape(len(base), -1)
    factors = arc(cosines(column_products(x, origin), floor), t)
    return add_task_vectors(origin, x, tuple(each.astype(kind) for each in factors), kind.type(1)).reshape(shape)


METHODS = (
    Method(
        name="nuslerp",
        title="NuSLERP",
        summary="interpolate between two models, or their task vectors, along the arc, by weights",
        advice="For two models; with a base for two fine-tunes whose task vectors differ in direction.",
        citation=Citation(
            "mergekit: NuSLERP", "Goddard", "software, 2024", "https://github.com/arcee-ai/mergekit"
        ),
        merge=merge,
        base="optional",
        min_models=2,
        max_models=2,
        parameters=(
            weight_parameter(),
            Parameter("axis", "str", "flat", "what the vectors are: whole tensors, or along the last or first axis",
                      choices=("flat", "last", "first"), mergekit=False, when=("variant", ("paper",))),
            Parameter("nuslerp_flatten", "bool", True, "the vectors are whole tensors",
                      when=("variant", ("mergekit",))),
            Parameter("nuslerp_row_wise", "bool", False, "with nuslerp_flatten: false, the first axis, not the last",
                      when=("variant", ("mergekit",))),
        ),
        passes=lambda parameters: (0, 1),
        variants=("paper", "mergekit"),
    ),
)  # fmt: skip

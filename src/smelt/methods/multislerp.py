"""Multi-SLERP: the weighted mean direction of several models, with their weighted mean norm.

C. Goddard, "Multi-SLERP", 2025, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea. Per tensor, with
x_i the models, or with a base the task vectors:

    u_i = x_i / (|x_i| + eps),   m = sum_i w_i u_i / |sum_i w_i u_i|,   out = m sum_i w_i |x_i|   (+ base)

The published steps go on from m along the tangent sum_i w_i (u_i - <u_i, m> m). That is the part of sum_i w_i u_i
which is orthogonal to m, and m is its direction: the tangent vanishes for any weights, and the result is m.

Edge cases: one model is returned as it is. Where the directions cancel out, two models give sum_i w_i x_i, more
are refused; zero task vectors everywhere give the base.
"""

from __future__ import annotations

from math import isfinite, sqrt

import numpy as np

from ..errors import OperationFailed, UsageError, show
from ..kernels.program import Copy
from .registry import Citation, Method, Parameter, Steps, weight_parameter
from .spherical import Floats, combined, norms_of, products
from .tensors import Tensor

#: A sum of directions that is shorter, relative to the weights, is what rounding has left of nothing.
_NOTHING = 1e-7


def merge(tensor: Tensor) -> Steps:
    if len(tensor.models) == 1:
        return Copy(tensor.models[0])
    weights = _weights(tensor)
    (gram,) = yield (products(tensor.models, tensor.base),)
    factors = coefficients(np.array(gram), weights, tensor["eps"])
    if factors is None:
        raise OperationFailed(
            f"tensor {show(tensor.name)}: the weighted directions of the models cancel out, so that multislerp has no "
            "direction to follow: change the weights, or use linear"
        )
    return combined(tensor.models, tuple(factors.tolist()), tensor.base)


def _weights(tensor: Tensor) -> Floats:
    weights = np.array(tensor.each["weight"])
    if not tensor["normalize_weights"]:
        return weights
    total = float(weights.sum())
    if abs(total) < 1e-12:
        raise UsageError(f"the weights of {tensor.name} sum to zero: set normalize_weights: false or change them")
    return weights / total


def coefficients(gram: Floats, weights: Floats, eps: float) -> Floats | None:
    """The factor of each x_i; None where there is no direction."""
    norms = norms_of(gram)
    largest = float(norms.max())
    if not isfinite(largest) or largest <= eps:
        return weights
    directions = weights / np.where(norms > 0, norms + eps, 1)
    length = sqrt(max(0.0, float(directions @ gram @ directions)))
    if length > max(eps, _NOTHING * float(np.abs(weights).sum())):
        return np.asarray(directions * (weights @ norms) / length)
    return weights if len(weights) == 2 else None


METHODS = (
    Method(
        name="multislerp",
        title="Multi-SLERP",
        summary="mean direction of several models, or of their task vectors, with their mean norm",
        advice="Where averaging shrinks: several fine-tunes, with their base, whose task vectors differ in direction.",
        citation=Citation(
            "Multi-SLERP", "Goddard", "blog, 2025", "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea"
        ),
        merge=merge,
        base="optional",
        parameters=(
            weight_parameter(),
            Parameter("normalize_weights", "bool", True, "divide the weights by their sum"),
            Parameter("eps", "float", 1e-8, "added to norms; shorter sums of directions count as none", low=0),
        ),
        passes=lambda parameters: (0, 1),
    ),
)

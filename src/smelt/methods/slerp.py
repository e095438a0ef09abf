"""Spherical linear interpolation between two models, tensor by tensor.

K. Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985; on weights as practised since 2023.

With a, b the flattened tensors and c the cosine between them:

    |c| > dot_threshold:  (1-t) a + t b
    else, theta = arccos c:  [sin((1-t) theta) a + sin(t theta) b] / sin theta

The vectors themselves are combined, not their directions, so the norm is not interpolated linearly. Fine-tunes
of one base nearly always lie above the threshold, where slerp is linear interpolation. A norm of at most
``eps`` counts as 1; if one is exactly zero, or the vectors are all but parallel, the interpolation is linear.
"""

from __future__ import annotations

from math import acos, sqrt

from .registry import REQUIRED, Citation, Method, Parameter, Steps
from .spherical import combined, products
from .tensors import Tensor, sine

#: Above this cosine arc and chord agree to float32's precision; opposite vectors have no arc at all.
_PARALLEL = 1 - 1e-6


def merge(tensor: Tensor) -> Steps:
    assert tensor.base is not None
    ends = (tensor.base, tensor.models[0])
    (gram,) = yield (products(ends),)
    return combined(ends, coefficients(gram, tensor["t"], tensor["dot_threshold"], tensor["eps"]))


def coefficients(gram: list[list[float]], t: float, threshold: float, eps: float) -> tuple[float, float]:
    """The factors of both end points, from their 2 x 2 Gram matrix."""
    norms = [sqrt(gram[i][i]) for i in (0, 1)]
    if 0.0 in norms:
        return 1 - t, t
    a, b = (norm if norm > eps else 1.0 for norm in norms)
    cosine = max(-1.0, min(1.0, gram[0][1] / (a * b)))
    if abs(cosine) > min(threshold, _PARALLEL):
        return 1 - t, t
    angle = acos(cosine)
    return sine((1 - t) * angle) / sine(angle), sine(t * angle) / sine(angle)


METHODS = (
    Method(
        name="slerp",
        title="Spherical linear interpolation",
        summary="interpolate between the base and one model along the arc",
        advice="For two models; t may run over depth, as in t: [0, 0.5, 1].",
        citation=Citation(
            "Animating rotation with quaternion curves",
            "Shoemake",
            "SIGGRAPH 1985",
            "https://doi.org/10.1145/325334.325242",
        ),
        merge=merge,
        max_models=1,
        parameters=(
            Parameter("t", "float", REQUIRED, "0 gives the base, 1 the other model"),
            Parameter("dot_threshold", "float", 0.9995, "linear above this cosine", low=0, high=1, mergekit=False),
            Parameter("eps", "float", 1e-8, "a norm up to this counts as 1", low=0, mergekit=False),
        ),
        passes=lambda parameters: (0, 1),
    ),
)

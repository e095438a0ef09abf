"""Karcher mean: the point of the sphere with the least sum of squared angles to all models, tensor by tensor.

H. Karcher, "Riemannian center of mass and mollifier smoothing", Communications on Pure and Applied Mathematics
1977, https://doi.org/10.1002/cpa.3160300502; for merging as in mergekit. With x_i the tensors as vectors,
u_i = x_i / |x_i| and shares a_i that sum to 1, from u = sum_i a_i u_i / |.| on:

    t = sum_i a_i theta_i / sin theta_i (u_i - cos theta_i u),   cos theta_i = <u, u_i>
    u <- cos |t| u + sin |t| t / |t|       until |t| < tol, at most max_iter times

    out = (sum_i a_i |x_i|) u

Every u lies in the span of the u_i, so the iteration runs on its n coefficients and the n x n cosines.
Norms up to ``tol`` give no direction, but count in the mean norm. Edge cases: where no norm exceeds ``tol``, and
where a model lies opposite to u, the result is sum_i a_i x_i; where the u_i cancel out, u starts at the first.
"""

from __future__ import annotations

from math import cos, sin, sqrt

import numpy as np

from ..errors import UsageError
from ..kernels.program import Copy
from .registry import Citation, Method, Parameter, Steps, weight_parameter
from .spherical import Floats, combined, norms_of, products, sine_of
from .tensors import Tensor

#: The least sine of an angle near 180 degrees that fp64 products can tell from 0.
_OPPOSITE = 1e-7


def merge(tensor: Tensor) -> Steps:
    if len(tensor.models) == 1:
        return Copy(tensor.models[0])
    weights = np.array(tensor.each["weight"])
    if not weights.any():
        raise UsageError(f"the weights of {tensor.name} are all zero: one must be positive")
    (gram,) = yield (products(tensor.models),)
    factors = coefficients(np.array(gram), weights / weights.sum(), tensor["max_iter"], tensor["tol"])
    return combined(tensor.models, tuple(factors.tolist()))


def coefficients(gram: Floats, shares: Floats, max_iter: int, tol: float) -> Floats:
    """The factor of each x_i."""
    norms = norms_of(gram)
    used = (norms > tol) & (shares > 0)
    if not used.any() or not np.isfinite(norms).all():
        return shares
    cosines = gram[np.ix_(used, used)] / np.outer(norms[used], norms[used])
    centre = centre_of(cosines, shares[used] / shares[used].sum(), max_iter, tol)
    if centre is None:
        return shares
    factors = np.zeros(len(shares))
    factors[used] = centre / norms[used]
    return factors * (shares @ norms)


def centre_of(cosines: Floats, shares: Floats, max_iter: int, tol: float) -> Floats | None:
    """q of the mean u = sum_i q_i u_i; None where a model lies opposite to it on the way."""
    length = _length(shares, cosines)
    q = shares / length if length >= tol else np.eye(len(shares))[0]
    for _ in range(max_iter):
        along = np.clip(cosines @ q, -1.0, 1.0)
        angles, sines = np.arccos(along), sine_of(along)
        if ((along < 0) & (sines < _OPPOSITE)).any():
            return None
        away = angles >= tol
        pull = np.where(away, shares * angles / np.where(away, sines, 1), 0)
        tangent = pull - (pull @ along) * q
        step = _length(tangent, cosines)
        if step < tol:
            break
        q = cos(step) * q + sin(step) / step * tangent
        q = q / _length(q, cosines)
    return q


def _length(q: Floats, cosines: Floats) -> float:
    """|sum_i q_i u_i|."""
    return sqrt(max(0.0, float(q @ cosines @ q)))


METHODS = (
    Method(
        name="karcher",
        title="Karcher mean",
        summary="mean of the models on the sphere, with their mean norm",
        advice="For models that lie far apart in direction; for fine-tunes of one base it is all but their mean.",
        citation=Citation(
            "Riemannian center of mass and mollifier smoothing",
            "Karcher",
            "Communications on Pure and Applied Mathematics 1977",
            "https://doi.org/10.1002/cpa.3160300502",
        ),
        merge=merge,
        base="ignored",
        parameters=(
            weight_parameter(1.0, low=0, mergekit=False),
            Parameter("max_iter", "int", 10, "steps at most", low=0),
            Parameter("tol", "float", 1e-5, "steps, angles and norms below this count as none", low=0, open_low=True),
        ),
        passes=lambda parameters: (0, 1),
    ),
)

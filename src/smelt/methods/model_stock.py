"""Model Stock: as far from the base towards the mean of its fine-tunes as the angle between them says.

Jang, Yun, Han, "Model Stock: all we need is just a few fine-tuned models", ECCV 2024,
https://arxiv.org/abs/2403.19522. Fine-tunes lie on a thin shell round an unseen centre; with
d_i = theta_i - theta_0 and c the cosine between them, the point nearest to the centre is

    theta = theta_0 + t mean_i d_i,    t = n c / (1 + (n - 1) c)

For more than two models c is the mean over all pairs. Per tensor, or with ``filter_wise`` per row along the last
axis (a vector is one row).

Edge cases: a zero d_i has cosine 0 with all others; t = 0 where 1 + (n - 1) c vanishes (below 1e-6). A
negative c gives a negative t, away from the fine-tunes, unless ``clamp``. Flavours: mergekit takes |d_i| |d_j| as
at least 1e-6 (``floor``), so that small task vectors collapse to the base.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernels.broadcast import PerRow
from ..kernels.program import Rows, call
from .registry import Citation, Method, Parameter, Steps
from .spherical import Floats, norms_of, products, row_products, vectors
from .task_arithmetic import add_task_vectors
from .tensors import Tensor


def merge(tensor: Tensor) -> Steps:
    size = len(tensor.models)
    scale: Any
    if tensor["filter_wise"] and len(tensor.shape) > 1:
        (grams,) = yield (Rows(row_products, vectors(tensor)),)
        scale = PerRow(_ratio(tensor, grams) / size, tensor.shape)
    else:
        (gram,) = yield (products(tensor.models, tensor.base),)
        scale = float(_ratio(tensor, np.array(gram))) / size
    return call(add_task_vectors, base=tensor.base, models=tensor.models, weights=(1.0,) * size, scale=scale)


def _ratio(tensor: Tensor, grams: Floats) -> Floats:
    found = ratio(mean_cosine(grams, tensor["floor"]), len(tensor.models))
    return np.clip(found, 0.0, 1.0) if tensor["clamp"] else found


def mean_cosine(grams: Floats, floor: float) -> Floats:
    """The mean over all pairs of the cosine between two task vectors, (...) from (..., n, n)."""
    i, j = np.triu_indices(grams.shape[-1], 1)
    norms = norms_of(grams)
    lengths = np.maximum(norms[..., i] * norms[..., j], floor)
    known = (lengths > 0) & np.isfinite(lengths)
    found = np.where(known, grams[..., i, j], 0) / np.where(known, lengths, 1)
    return np.asarray(np.clip(found, -1.0, 1.0).mean(axis=-1))


def ratio(cosine: Floats, size: int) -> Floats:
    """t: the share of the way from the base to the mean of ``size`` fine-tunes."""
    divisor = 1 + (size - 1) * cosine
    usable = np.abs(divisor) >= 1e-6
    return np.where(usable, size * cosine / np.where(usable, divisor, 1), 0)


METHODS = (
    Method(
        name="model_stock",
        title="Model Stock",
        summary="base plus the mean task vector, scaled by the angle between the task vectors",
        advice="For two to four fine-tunes of one base on the same task, in place of averaging many.",
        citation=Citation(
            "Model Stock: all we need is just a few fine-tuned models",
            "Jang, Yun, Han",
            "ECCV 2024",
            "https://arxiv.org/abs/2403.19522",
        ),
        merge=merge,
        min_models=2,
        parameters=(
            Parameter("filter_wise", "bool", False, "one angle per row, not per tensor"),
            Parameter("floor", "float", 0.0, "the product of two norms counts as at least this", low=0,
                      mergekit=False, defaults=(("mergekit", 1e-6),)),
            Parameter("clamp", "bool", False, "keep the way between base and mean", mergekit=False),
        ),
        passes=lambda parameters: (0, 1),
        variants=("paper", "mergekit"),
    ),
)  # fmt: skip

"""TSV-Merge: the leading singular vectors of every task's matrices, made orthogonal to those of the other tasks.

Gargiulo et al., "Task singular vectors: reducing task interference in model merging", CVPR 2025,
https://arxiv.org/abs/2412.00081. For each matrix, T tasks, r = min(m, n):

1. Delta_t = theta_t - theta_0 = U_t S_t V_t^T; its first k = int(r / T) triplets are kept (``rank_fraction``
   in place of 1 / T), one at least;
2. U = [U_1 .. U_T], V = [V_1 .. V_T], S the values of all;
3. U and V are replaced by the nearest matrices with orthonormal columns: their polar factors (``orthogonalise``);
4. theta = theta_0 + alpha U S V^T.

``rank_fraction: 1`` is the authors' "lossless" variant, ``orthogonalise: false`` their ablation "rank reduction".
Whatever is no matrix, has fewer rows or columns than there are tasks, or is named by ``average``, takes
the mean of the deltas, times alpha.

Where the reference leaves vectors to chance they are left out here: of singular values that are zero (equal
models, LoRA: see ``tolerance``), and directions that the joint U or V lacks (equal tasks: T copies of one
model give its truncated delta).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.program import Call, Whole, call
from .registry import EXCLUDE, Citation, Method, Parameter, weight_parameter
from .spectral import Matrix, Triplets, combined, triplets
from .task_arithmetic import add_task_vectors
from .tensors import Tensor


def merge(tensor: Tensor) -> Call | Whole:
    if is_averaged(tensor):
        return averaged(tensor)
    return Whole(merged, {
        "base": tensor.base, "models": tensor.models, "weights": tensor.each["weight"], "scale": tensor["alpha"],
        "rank": rank_of(tensor), "orthogonal": tensor["orthogonalise"], "tolerance": tensor["tolerance"],
    })  # fmt: skip


def merged(base: Any, models: Any, weights: Any, scale: float, rank: int, orthogonal: bool, tolerance: float) -> Matrix:
    """The merged matrix (m, n) of T models' matrices (m, n)."""
    parts = [
        triplets(delta_of(base, model), rank, tolerance).scaled(weight)
        for model, weight in zip(models, weights, strict=True)
    ]
    return np.asarray(base + scale * combined(significant(parts), orthogonal).matrix(), np.float64)


def delta_of(base: npt.NDArray[Any], model: npt.NDArray[Any]) -> Matrix:
    """model - base without rounding."""
    return np.asarray(model, np.float64) - np.asarray(base, np.float64)


def significant(parts: list[Triplets]) -> list[Triplets]:
    """Without those that are multiplied by 0; one of rank 0 where nothing is left."""
    return [part for part in parts if part.rank and part.sigma[0] != 0] or [parts[0].first(0)]


def rank_of(tensor: Tensor) -> int:
    """k, the triplets that are kept of each task."""
    share = tensor["rank_fraction"]
    return max(1, int(min(tensor.shape) * (1 / tensor.size if share is None else share)))


def is_averaged(tensor: Tensor) -> bool:
    """Whether a tensor is not taken apart."""
    if len(tensor.shape) != 2 or (tensor.shared.get("rank_fraction") is None and min(tensor.shape) < tensor.size):
        return True
    return any(re.match(pattern, tensor.name) for pattern in tensor["average"])


def averaged(tensor: Tensor) -> Call:
    """The mean of the deltas, times alpha."""
    weights = tensor.each.get("weight", (1.0,) * tensor.size)
    scale = tensor["alpha"] / tensor.size
    return call(add_task_vectors, base=tensor.base, models=tensor.models, weights=weights, scale=scale)


def holds(tensor: Tensor) -> tuple[int, int]:
    """A delta, its Gram matrix and the eigenvectors; the vectors of all tasks, their Gram matrices; the result."""
    if is_averaged(tensor):
        return 1, 0
    return tensor.count, held(tensor, rank_of(tensor) * tensor.size)


def held(tensor: Tensor, rank: int) -> int:
    """Bytes for each element of a matrix while ``rank`` pairs of vectors and their Gram matrices are in memory."""
    short, long = sorted(tensor.shape)
    inner = min(rank, long)
    beside = 4 * short * short + 2 * rank * (short + long) + 4 * inner * inner
    return 4 * (tensor.size + 1) + 32 + 8 * -(-beside // tensor.count)


ALPHA = Parameter("alpha", "float", 1.0, "factor of the merged task vector: 0.3 to 3", mergekit=False)
AVERAGE = Parameter(
    "average", "strings", (".*text_projection",),
    "regular expressions, anchored at the start: such matrices are averaged", mergekit=False,
)  # fmt: skip
TOLERANCE = Parameter(
    "tolerance", "float", 0.0,
    "singular values up to this share of the largest count as zero; for merged LoRA adapters 0.001",
    low=0, high=1, mergekit=False,
)  # fmt: skip

METHODS = (
    Method(
        name="tsv",
        title="TSV-Merge, task singular vectors",
        summary="each task's leading singular vectors, made orthogonal to the others'",
        advice="For many tasks (8 to 20) with one base, without data: alpha 1; exclude embeddings to save time.",
        citation=Citation(
            "Task singular vectors: reducing task interference in model merging", "Gargiulo et al.", "CVPR 2025",
            "https://arxiv.org/abs/2412.00081",
        ),
        merge=merge,
        holds=holds,
        parameters=(
            weight_parameter(1.0, mergekit=False),
            ALPHA,
            Parameter("rank_fraction", "float", None, "share of a matrix's rank that each task keeps; by default 1/T",
                      low=0, high=1, open_low=True, mergekit=False),
            Parameter("orthogonalise", "bool", True, "make the joint singular vectors orthogonal", mergekit=False),
            TOLERANCE,
            AVERAGE,
            EXCLUDE,
        ),
    ),
)  # fmt: skip

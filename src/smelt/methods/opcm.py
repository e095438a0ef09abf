"""OPCM: add task vectors one by one, each without its part in what already dominates the sum.

Tang, Yang, Shen, Luo, Hu, Du, Tao, "Merging models on the fly without retraining: a sequential approach to scalable
continual model merging", NeurIPS 2025, https://arxiv.org/abs/2501.09522. With x_t = theta_t - theta_0, models
in the order given:

1. acc_1 = x_1; acc_t = acc_{t-1} + x_t - U_k (U_k^T x_t V_k) V_k^T, U_k, V_k the leading k singular vectors of
   acc_{t-1};
2. k is the number of singular values that together stay within the share ``alpha`` of their sum (all at 1);
3. theta = theta_0 + acc_n A / |acc_n|, A the mean over the models of |x_t|; both norms over the whole model.

The paper's rescaling after every model is a factor of the sum, which singular vectors do not see, so that one at
the end is the same. Only linear weights are projected: of token and position tables, vectors and tensors of more
axes the deltas are added as they are. ``zero_diagonal`` also takes away all u_i v_i^T, as a later version of the
authors' code does; singular values of zero have no such pair. The order counts; ``shuffle`` draws it from the seed.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from ..kernels.blas import one_thread
from ..kernels.program import ByRow, Call, Copy, Operand, Totals, Whole, call
from ..kernels.random import key_of, words
from ..kernels.vocabulary import where
from .registry import EXCLUDE, Citation, Method, Parameter, Steps
from .spectral import Matrix, triplets
from .spectral import finite as without_gaps
from .task_arithmetic import add_task_vectors
from .task_matrices import held
from .tensors import Model, Tensor

# --- the element formulas: what is not finite counts as 0, the pass that makes the output finds it -------------


def finite(x: Any) -> Any:
    return where(x - x == 0, x, 0)


def square(x: Any) -> Any:
    return (x * x,)


def square_of_sum(base: Any, models: Any) -> Any:
    total = 0
    for model in models:
        total += finite(model - base)
    return (total * total,)


# --- the factor of the sum ----------------------------------------------------------------------------------


def survey(model: Model) -> Steps:
    """mean |x_t| / |acc_n|, or 0 where there is no sum."""
    tensors = [tensor for tensor in model.tensors if tensor.count]
    if not tensors:
        return 0.0
    found = yield (
        *(Totals(tuple(_square_of_delta(tensor, i) for tensor in tensors)) for i in range(model.size)),
        Totals(tuple(_square_of_sum(tensor) for tensor in tensors)),
    )
    *norms, total = (sqrt(norm) for (norm,) in found)
    return sum(norms) / model.size / total if total > 0 else 0.0


def _square_of_delta(tensor: Tensor, index: int) -> Call:
    return call(square_of_sum, base=tensor.base, models=(tensor.models[index],))


def _square_of_sum(tensor: Tensor) -> Call:
    if not _is_projected(tensor):
        return call(square_of_sum, base=tensor.base, models=tensor.models)
    # The whole tensor is one row, because none of its elements is known without the others.
    return call(square, x=ByRow(_sum_of_row, {**_given(tensor), "shape": tensor.shape}, (1, tensor.count)))


def _is_projected(tensor: Tensor) -> bool:
    table = tensor.role is not None and tensor.role.role in ("embedding", "position")
    return len(tensor.shape) == 2 and tensor.size > 1 and not table


def _given(tensor: Tensor) -> dict[str, Any]:
    return {
        "base": tensor.base, "models": _in_turn(tensor), "alpha": tensor["alpha"], "diagonal": tensor["zero_diagonal"],
    }  # fmt: skip


def _in_turn(tensor: Tensor) -> tuple[Operand, ...]:
    if not tensor["shuffle"]:
        return tensor.models
    drawn = words(key_of(tensor.seed, "order of the models", 0), 0, tensor.size)
    return tuple(tensor.models[index] for index in np.argsort(drawn, kind="stable"))


def _sum_of_row(base: Any, models: tuple[Any, ...], shape: tuple[int, ...], **options: Any) -> Matrix:
    start, *others = (without_gaps(x).reshape(shape) for x in (base, *models))
    with one_thread():
        return projected_sum(start, tuple(others), **options).reshape(1, -1)


# --- the sum ------------------------------------------------------------------------------------------------


def merge(tensor: Tensor) -> Call | Copy | Whole:
    if tensor.size == 1:
        return Copy(tensor.models[0])
    if _is_projected(tensor):
        return Whole(merged, {**_given(tensor), "scale": tensor.survey})
    ones = (1.0,) * tensor.size
    return call(add_task_vectors, base=tensor.base, models=tensor.models, weights=ones, scale=tensor.survey)


def merged(base: Any, models: tuple[Any, ...], alpha: float, diagonal: bool, scale: float) -> Matrix:
    return np.asarray(base + scale * projected_sum(base, models, alpha, diagonal))


def projected_sum(base: Any, models: tuple[Any, ...], alpha: float, diagonal: bool) -> Matrix:
    """acc_n (m, n) of the models' matrices (m, n) in their order, in fp64."""
    start = np.asarray(base, np.float64)
    total = models[0] - start
    for model in models[1:]:
        delta = model - start
        total += delta - dominated(total, delta, alpha, diagonal)
    return np.asarray(total)


def dominated(total: Matrix, delta: Matrix, alpha: float, diagonal: bool) -> Matrix:
    """The part of ``delta`` that lies in what dominates ``total``."""

    def dominant(sigma: Matrix) -> int:
        sums = np.cumsum(sigma)
        return int((sums <= alpha * sums[-1]).sum())

    found = triplets(total, None if diagonal else dominant)
    leading = found.first(dominant(found.sigma) if diagonal and found.rank else found.rank)
    part = leading.left @ (leading.left.T @ delta @ leading.right) @ leading.right.T
    if diagonal:
        alike = (found.left * (delta @ found.right)).sum(axis=0)
        alike[: leading.rank] = 0
        part += (found.left * alike) @ found.right.T
    return np.asarray(part)


def holds(tensor: Tensor) -> tuple[int, int]:
    return held(tensor, 4 * (tensor.size + 1) + 39, 4) if _is_projected(tensor) else (1, 0)


METHODS = (
    Method(
        name="opcm",
        title="OPCM, orthogonal projection",
        summary="add task vectors one by one, each without its part in what dominates the sum",
        advice="For models that come one after the other, the most important first: the norm of the change stays.",
        citation=Citation(
            "Merging models on the fly without retraining: a sequential approach to scalable continual model merging",
            "Tang et al.", "NeurIPS 2025", "https://arxiv.org/abs/2501.09522",
        ),
        merge=merge,
        survey=survey,
        passes=lambda parameters: (1, 0),
        holds=holds,
        random=True,
        parameters=(
            Parameter("alpha", "float", 0.5, "share of the sum of singular values that counts as dominant", low=0,
                      high=1, mergekit=False),
            Parameter("zero_diagonal", "bool", False, "take away all pairs of equal singular vectors too",
                      mergekit=False),
            Parameter("shuffle", "bool", False, "take the models in an order drawn from the seed", mergekit=False),
            EXCLUDE,
        ),
    ),
)  # fmt: skip

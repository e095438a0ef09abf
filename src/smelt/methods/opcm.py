"""OPCM: add task vectors one by one, each without its part in what already dominates the sum.

Tang, Yang, Shen, Luo, Hu, Du, Tao, "Merging models on the fly without retraining: a sequential approach to scalable
continual model merging", NeurIPS 2025, https://arxiv.org/abs/2501.09522. With x_t = theta_t - theta_0, models
in the order given:

1. acc_1 = x_1; acc_t = acc_{t-1} + x_t - U_k (U_k^T x_t V_k) V_k^T, U_k, V_k the leading k singular vectors of
   acc_{t-1};
2. k is the number of singular values that together stay within the share ``alpha`` of their sum (all at 1);
3. theta = theta_0 + acc_n A / |acc_n|, A the mean over the models of |x_t|; both norms over the whole model.

The paper's rescaling after every model is a factor of the sum, which singular vectors do not see, so that one at
the end is the same. acc is rounded to float32 after every model: it can be stored there, with n and the sum of
|x_t|, and the merge be continued later. Only linear weights are projected: of token and position tables, vectors and
tensors of more axes the deltas are added as they are. ``zero_diagonal`` also takes away all u_i v_i^T, as a later
version of the authors' code does; singular values of zero have no such pair. The order counts; ``shuffle`` draws it
from the seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any, NamedTuple

import numpy as np

from ..kernels.blas import one_thread
from ..kernels.program import ByRow, Call, Copy, Operand, Totals, Whole, call
from ..kernels.random import key_of, words
from ..kernels.vocabulary import where
from .registry import EXCLUDE, Citation, Method, Parameter, Running, Steps
from .spectral import Matrix, triplets
from .spectral import finite as without_gaps
from .task_arithmetic import add_scaled, add_task_vectors, sum_of
from .task_matrices import held
from .tensors import Model, Tensor

# --- the element formulas: what is not finite counts as 0, the pass that makes the output finds it -------------


def finite(x: Any) -> Any:
    return where(x - x == 0, x, 0)


def square(x: Any) -> Any:
    value = finite(x)
    return (value * value,)


def square_of_sum(base: Any, models: Any) -> Any:
    total = 0
    for model in models:
        total += finite(model - base)
    return (total * total,)


# --- the factor of the sum ----------------------------------------------------------------------------------


class Known(NamedTuple):
    """Of all models: how many there are, the sum of |x_t|, and the factor of acc_n: mean |x_t| / |acc_n|."""

    models: int = 0
    norms: float = 0.0
    scale: float = 0.0


def survey(model: Model) -> Steps:
    """What is known; the factor is 0 where there is no sum."""
    tensors = [tensor for tensor in model.tensors if tensor.count]
    if not tensors:
        return Known()
    found = yield (
        *(Totals(tuple(_square_of_delta(tensor, i) for tensor in tensors)) for i in range(model.size)),
        Totals(tuple(_square_of_sum(tensor) for tensor in tensors)),
    )
    *norms, length = (sqrt(norm) for (norm,) in found)
    models, total = int(model.before.get("models", 0)) + model.size, model.before.get("norms", 0.0)
    for norm in norms:  # one by one: sum() would round otherwise when there are more of them at once
        total += norm
    return Known(models, total, total / models / length if length > 0 else 0.0)


def _square_of_delta(tensor: Tensor, index: int) -> Call:
    return call(square_of_sum, base=tensor.base, models=(tensor.models[index],))


def _square_of_sum(tensor: Tensor) -> Call:
    if tensor.state is not None:
        return call(square, x=tensor.state)
    if not _is_projected(tensor):
        return call(square_of_sum, base=tensor.base, models=tensor.models)
    # The whole tensor is one row, because none of its elements is known without the others.
    dtype = tensor.computed_in
    return call(square, x=ByRow(_sum_of_row, {**_given(tensor), "shape": tensor.shape}, (1, tensor.count), dtype))


def _is_projected(tensor: Tensor) -> bool:
    table = tensor.role is not None and tensor.role.role in ("embedding", "position")
    several = tensor.size > 1 or tensor.before is not None
    return len(tensor.shape) == 2 and several and not table


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
        return np.asarray(projected_sum(start, tuple(others), **options)).reshape(1, -1)


# --- the sum ------------------------------------------------------------------------------------------------


def merge(tensor: Tensor) -> Call | Copy | Whole:
    if tensor.size == 1 and tensor.before is None:
        return Copy(tensor.models[0])
    scale = (tensor.survey or Known()).scale
    if tensor.state is not None:
        return call(add_scaled, base=tensor.base, total=tensor.state, scale=scale)
    if _is_projected(tensor):
        return Whole(merged, {**_given(tensor), "scale": scale})
    return call(add_task_vectors, base=tensor.base, models=tensor.models, weights=_ones(tensor), scale=scale)


def state(tensor: Tensor) -> Call | Whole:
    """acc_n."""
    if not _is_projected(tensor):
        return sum_of(tensor, _ones(tensor))
    before = {} if tensor.before is None else {"before": tensor.before}
    return Whole(projected_sum, {**_given(tensor), **before})


def _ones(tensor: Tensor) -> tuple[float, ...]:
    return (1.0,) * tensor.size


def merged(base: Any, models: tuple[Any, ...], alpha: float, diagonal: bool, scale: float) -> Matrix:
    return np.asarray(base + scale * projected_sum(base, models, alpha, diagonal))


def projected_sum(base: Any, models: tuple[Any, ...], alpha: float, diagonal: bool, before: Any = None) -> Any:
    """acc_n (m, n) of the models' matrices (m, n) in their order, from ``before`` on; each acc_t is of their dtype."""
    start = np.asarray(base, np.float64)
    total = before
    for model in models:
        delta = model - start
        if total is not None:
            held = total.astype(np.float64)
            delta += held - dominated(held, delta, alpha, diagonal)
        total = delta.astype(base.dtype)
    return total


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
    if tensor.state is not None or not _is_projected(tensor):
        return 1, 0
    return held(tensor, 4 * (tensor.size + 1 + (tensor.before is not None)) + 37, 2.8)


def _numbers(known: Known) -> dict[str, float]:
    return {"models": known.models, "norms": known.norms}


def _obstacle(shared: Mapping[str, Any]) -> str | None:
    return "with shuffle the order of the models is drawn from how many there are" if shared["shuffle"] else None


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
        running=Running(state, _numbers, _obstacle),
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

"""TSV: the leading singular vectors of every task's matrices, made orthogonal to those of the other tasks, or stored.

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

TSV-Compress keeps the tasks apart: ``task`` gives the model of one, theta_0 + its k triplets, and the parts of a
result are the triplets of all. There every matrix counts, and all other deltas are kept as they are.

Where the reference leaves vectors to chance they are left out here: of singular values that are zero (equal
models, LoRA: see ``tolerance``), and directions that the joint U or V lacks (equal tasks: T copies of one
model give its truncated delta).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..kernels.program import Call, Copy, Operand, Output, Source, Whole, call
from .low_rank import holds_core, is_low_rank, is_unchanged, merged_in_core
from .parts import FOR_NO_TASK, TASK, packed, task_of
from .registry import EXCLUDE, Citation, Method, Parameter, weight_parameter
from .spectral import (
    Matrix,
    Strips,
    Triplets,
    beside,
    combined,
    inverse_root,
    orthogonal_sum,
    right_side,
    triplets,
)
from .task_matrices import (
    ALPHA,
    AVERAGE,
    TOLERANCE,
    at_most,
    averaged,
    delta_of,
    held,
    held_in_strips,
    in_many_strips,
    is_matrix,
    spans,
    task_strips,
)
from .tensors import Tensor, delta

#: A matrix is long, like a table of tokens, where it has so many times more rows than columns.
_LONG = 8


def merge(tensor: Tensor) -> Call | Copy | Whole:
    task = task_of(tensor)
    if task is not None:
        return of_task(tensor, tensor.models[task])
    if tensor.base is not None and is_unchanged(tensor):
        return Copy(tensor.base)
    if not is_truncated(tensor):
        return averaged(tensor)
    given = {
        "base": tensor.base, "weights": tensor.each["weight"], "scale": tensor["alpha"], "rank": rank_of(tensor),
        "orthogonal": tensor["orthogonalise"], "tolerance": tensor["tolerance"],
    }  # fmt: skip
    if tensor.ranks:
        return Whole(partial(merged_in_core, function=merged), {**given, "changes": tensor.changes}, strips=True)
    given["models"] = tensor.models
    return Whole(merged_in_strips, given, strips=True) if _fill_no_more_than(tensor) else Whole(merged, given)


def _is_kept(shape: tuple[int, ...]) -> bool:
    """Whether U is held: where it is of the size of square matrices, or of a strip as it is."""
    return shape[0] <= _LONG * shape[1]


def _fill_no_more_than(tensor: Tensor) -> bool:
    """Whether all tasks together have no more directions than the matrix."""
    return rank_of(tensor) * tensor.size <= min(tensor.shape)


def merged_in_strips(
    base: Source, models: tuple[Source, ...], weights: tuple[float, ...], scale: float, rank: int, orthogonal: bool,
    tolerance: float,
) -> Iterator[Matrix]:  # fmt: skip
    """As :func:`merged`, of matrices that are never held; U is D_t V_t / S_t, kept where it is not much longer than
    wide, else made strip by strip."""
    turned = base.shape[0] < base.shape[1]
    deltas = [task_strips(base, model) for model in models]
    joint, middle = _joint(deltas, weights, rank, orthogonal, tolerance, _is_kept(base.shape))
    for (first, last), strip in zip(spans(base.shape), joint.parts(), strict=True):
        change = middle.T @ strip.T if turned else strip @ middle
        change *= scale
        change += base.rows(first, last)
        yield change


def _joint(
    deltas: list[Strips], weights: tuple[float, ...], rank: int, orthogonal: bool, tolerance: float, kept: bool
) -> tuple[Strips, Matrix]:
    """U, and what it is multiplied by from the right: the rest of its polar factor, S, and that of V^T."""
    left, sigmas, rights = [], [], []
    for task, weight in zip(deltas, weights, strict=True):
        sigma, vectors = right_side(task, rank if weight else 0, tolerance)
        if len(sigma) or task is deltas[0]:
            own = task.times(vectors / sigma)
            left.append(own.held() if kept else own)
            sigmas.append(sigma * weight)
            rights.append(vectors)
    joint, sigma, right = beside(left), np.concatenate(sigmas), np.concatenate(rights, axis=1)
    del left, rights, vectors
    if not orthogonal or len(deltas) == 1:
        return joint, sigma[:, None] * right.T
    right = sigma[:, None] * (inverse_root(right).matrix @ right.T)
    return joint, inverse_root(joint).matrix @ right


def merged(base: Any, models: Any, weights: Any, scale: float, rank: int, orthogonal: bool, tolerance: float) -> Any:
    """The merged matrix (m, n) of T models' matrices (m, n)."""
    parts = [
        triplets(delta_of(base, model), rank, tolerance).scaled(weight)
        for model, weight in zip(models, weights, strict=True)
    ]
    return joined(base, parts, scale, orthogonal)


def joined(base: Any, parts: list[Triplets], scale: float, orthogonal: bool) -> Any:
    """Steps 2 to 4, from the triplets of every task."""
    chosen = significant(parts)
    return base + scale * (orthogonal_sum(chosen) if orthogonal else combined(chosen, orthogonal=False).matrix())


def of_task(tensor: Tensor, model: Operand) -> Copy | Whole:
    """The model of one task."""
    if len(tensor.shape) != 2:
        return Copy(model)
    return Whole(truncated, {"base": tensor.base, "model": model, **_cut(tensor)})


def parts(tensor: Tensor) -> dict[str, Output]:
    if len(tensor.shape) != 2:
        return {f"delta.{task}": call(delta, base=tensor.base, model=m) for task, m in enumerate(tensor.models)}
    shape = rank_of(tensor), sum(tensor.shape) + 1
    return {
        f"factors.{task}": Whole(factors, {"base": tensor.base, "model": model, **_cut(tensor)}, shape=shape)
        for task, model in enumerate(tensor.models)
    }


def _cut(tensor: Tensor) -> dict[str, Any]:
    return {"rank": rank_of(tensor), "tolerance": tensor["tolerance"]}


def truncated(base: Any, model: Any, rank: int, tolerance: float) -> Any:
    """The model (m, n) with a task vector of ``rank`` triplets."""
    return base + triplets(delta_of(base, model), rank, tolerance).matrix()


def factors(base: Any, model: Any, rank: int, tolerance: float) -> Any:
    """The triplets (rank, m + 1 + n) of the task vector."""
    return packed(triplets(delta_of(base, model), rank, tolerance), rank)


def significant(parts: list[Triplets]) -> list[Triplets]:
    """Without those that are multiplied by 0; one of rank 0 where nothing is left."""
    return [part for part in parts if part.rank and part.sigma[0] != 0] or [parts[0].first(0)]


def rank_of(tensor: Tensor) -> int:
    """k, the triplets that are kept of each task."""
    return truncation(min(tensor.shape), tensor.size, tensor["rank_fraction"])


def truncation(rank: int, tasks: int, fraction: float | None = None) -> int:
    return max(1, int(rank * (1 / tasks if fraction is None else fraction)))


def is_truncated(tensor: Tensor) -> bool:
    """Whether a tensor is taken apart: each task needs one direction at least."""
    return is_matrix(tensor) and (tensor["rank_fraction"] is not None or min(tensor.shape) >= tensor.size)


def holds(tensor: Tensor) -> tuple[int, int]:
    if tensor["task"] is not None:
        return held(tensor, 26, 3.15) if len(tensor.shape) == 2 else (1, 0)
    if not is_truncated(tensor) or is_unchanged(tensor):
        return 1, 0
    if tensor.ranks:
        return holds_core(tensor)
    if _fill_no_more_than(tensor) and _is_kept(tensor.shape):
        joint, strips = 8 * tensor.count, 4.9 if in_many_strips(tensor) else 3.8
        return at_most(tensor, joint + held_in_strips(tensor, strips, 1), joint + held_in_strips(tensor, 1, 4.5))
    if _fill_no_more_than(tensor):
        strips = tensor.size + (6 if in_many_strips(tensor) else 3.5)
        return at_most(tensor, held_in_strips(tensor, strips, 4), held_in_strips(tensor, 2, 6.5))
    share = max(1.0, rank_of(tensor) * tensor.size / max(1, min(tensor.shape)))
    return held(tensor, 4 * (tensor.size + 1) + 50 * share, 3 + 2.6 * share)


METHODS = (
    Method(
        name="tsv",
        title="TSV, task singular vectors",
        summary="each task's leading singular vectors, made orthogonal to the others'",
        advice="For many tasks (8 to 20) with one base, without data: alpha 1; exclude embeddings to save time.",
        citation=Citation(
            "Task singular vectors: reducing task interference in model merging", "Gargiulo et al.", "CVPR 2025",
            "https://arxiv.org/abs/2412.00081",
        ),
        merge=merge,
        parts=parts,
        holds=holds,
        low_rank=lambda tensor: tensor["task"] is None and is_low_rank(tensor, is_truncated(tensor)),
        parameters=(
            TASK,
            weight_parameter(1.0, mergekit=False, when=FOR_NO_TASK),
            replace(ALPHA, when=FOR_NO_TASK),
            Parameter("rank_fraction", "float", None, "share of a matrix's rank that each task keeps; by default 1/T",
                      low=0, high=1, open_low=True, mergekit=False),
            Parameter("orthogonalise", "bool", True, "make the joint singular vectors orthogonal", mergekit=False,
                      when=FOR_NO_TASK),
            TOLERANCE,
            replace(AVERAGE, when=FOR_NO_TASK),
            EXCLUDE,
        ),
    ),
)  # fmt: skip

"""Iso-C and Iso-CTS: the sum of the task matrices with all its singular values alike.

Marczak et al., "No task left behind: isotropic model merging with common and task-specific subspaces", ICML
2025, https://arxiv.org/abs/2502.04959. For each matrix, Delta_t = theta_t - theta_0, r = min(m, n):

    Iso-C:    A = sum_t Delta_t = U S V^T,   sigma = mean of S,   theta = theta_0 + alpha sigma U V^T

so that it is the polar factor of A times its nuclear norm / r. Iso-CTS puts directions of single tasks in place
of the weakest ones of the sum:

1. r f of them stay (f = ``common_space_fraction``), rounded so that the others are as many for every task;
2. task by task: the first singular triplets of Delta_t - U_c U_c^T Delta_t, U_c what stays on the left;
3. the vectors of all tasks and of the sum side by side, both sides orthogonalised (polar factor);
4. sigma = mean of the singular values of all.

``beta`` below 1 keeps some of the spectrum: (1 - beta) S + beta sigma. Whatever is no matrix, or is named by
``average``, takes the mean of the deltas, times alpha.

Where A lacks directions (LoRA, few models) the reference gives arbitrary ones the full weight sigma; here they
are left out. sigma is the mean over r all the same, or over the rank (``sigma_over``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..kernels.program import Call, Copy, Whole
from .low_rank import holds_core, is_low_rank, is_unchanged, merged_in_core
from .registry import EXCLUDE, Citation, Method, Parameter
from .spectral import Matrix, Triplets, combined, polar, spectrum_and_polar, triplets
from .task_matrices import ALPHA, AVERAGE, TOLERANCE, averaged, delta_of, held, is_matrix
from .tensors import Tensor


def merge(tensor: Tensor) -> Call | Copy | Whole:
    if tensor.base is not None and is_unchanged(tensor):
        return Copy(tensor.base)
    if not is_matrix(tensor):
        return averaged(tensor)
    rank, function = min(tensor.shape), levelled if tensor.variant == "iso_c" else levelled_with_tasks
    given = {
        "base": tensor.base, "scale": tensor["alpha"], "beta": tensor["beta"], "rank": rank,
        "over_rank": tensor["sigma_over"] == "rank", "tolerance": tensor["tolerance"],
    }  # fmt: skip
    if tensor.variant != "iso_c":
        given["own"] = directions(rank, tensor.size, tensor["common_space_fraction"])
    if tensor.ranks:
        return Whole(partial(merged_in_core, function=function), {**given, "changes": tensor.changes}, strips=True)
    return Whole(function, {**given, "models": tensor.models})


def directions(rank: int, tasks: int, fraction: float) -> int:
    """How many directions each task has of its own."""
    own = round((rank - int(rank * fraction)) / tasks)
    return min(own, rank // tasks)


def levelled(
    base: Any, models: Any, scale: float, beta: float, over_rank: bool, tolerance: float, rank: int
) -> Any:  # fmt: skip
    """Iso-C of T matrices (m, n); ``rank``: how many directions there could be."""
    total = sum_of_deltas(base, models)
    values, factor = spectrum_and_polar(total, tolerance)
    sigma = mean_of(values, rank, over_rank)
    factor *= scale * beta * sigma
    if beta != 1:
        factor += scale * (1 - beta) * total
    factor += base
    return factor


def levelled_with_tasks(
    base: Any, models: Any, scale: float, beta: float, over_rank: bool, tolerance: float, rank: int, own: int
) -> Any:
    """Iso-CTS of T matrices (m, n)."""
    total = sum_of_deltas(base, models)
    common = triplets(total, rank - own * len(models), tolerance)
    parts = [special(common, delta_of(base, model), own, tolerance) for model in models if own]
    joint = with_common(parts, common) if parts else common
    sigma = mean_of(joint.sigma, rank, over_rank)
    level = Triplets(joint.left, (1 - beta) * joint.sigma + beta * sigma, joint.right)
    return base + scale * level.matrix()


def special(common: Triplets, delta: Matrix, own: int, tolerance: float) -> Triplets:
    """A task's first triplets without what the common directions hold on the left.

    Removed twice where little remains, which is rounding in part.
    """
    rest, size = without(common, delta), float(np.linalg.norm(delta))
    if np.linalg.norm(rest) < 0.1 * size:
        rest = without(common, rest)
    found = triplets(rest, own, tolerance, size=size)
    return Triplets(without(common, found.left), found.sigma, found.right)


def without(common: Triplets, columns: Matrix) -> Matrix:
    return np.asarray(columns - common.left @ (common.left.T @ columns))


def with_common(parts: list[Triplets], common: Triplets) -> Triplets:
    """Side by side, both sides orthogonalised; on the left those of the tasks are orthogonal to the common ones."""
    own = combined(parts, orthogonal=False)
    joint = combined([own, common], orthogonal=False)
    return Triplets(np.concatenate([polar(own.left), common.left], axis=1), joint.sigma, polar(joint.right))


def sum_of_deltas(base: Any, models: Any) -> Matrix:
    """In one array: sums of fp32 numbers are as good as exact in fp64, whatever is taken off last."""
    total = models[0].astype(np.float64)
    for model in models[1:]:
        total += model
    total -= len(models) * base.astype(np.float64)
    return np.asarray(total)


def mean_of(values: Matrix, rank: int, over_rank: bool) -> float:
    """sigma: over all ``rank`` directions, or over those that there are."""
    return float(values.sum()) / max(1, len(values) if over_rank else rank)


def holds(tensor: Tensor) -> tuple[int, int]:
    if not is_matrix(tensor) or is_unchanged(tensor):
        return 1, 0
    if tensor.ranks:
        return holds_core(tensor)
    operands = 4 * (tensor.size + 1)
    return held(tensor, operands + 20.5, 2.85) if tensor.variant == "iso_c" else held(tensor, operands + 42, 5.7)


METHODS = (
    Method(
        name="iso",
        title="Isotropic merging, Iso-C and Iso-CTS",
        summary="the sum of task matrices with all singular values alike",
        advice="For many tasks with one base, and for LoRA fine-tunes: alpha 1, by a validation score 0.5 to 2.5.",
        citation=Citation(
            "No task left behind: isotropic model merging with common and task-specific subspaces",
            "Marczak et al.", "ICML 2025", "https://arxiv.org/abs/2502.04959",
        ),
        merge=merge,
        holds=holds,
        low_rank=lambda tensor: is_low_rank(tensor, is_matrix(tensor)),
        parameters=(
            ALPHA,
            Parameter("common_space_fraction", "float", 0.8, "share of the directions that are those of the sum",
                      low=0, high=1, mergekit=False, when=("variant", ("iso_cts",))),
            Parameter("beta", "float", 1.0, "0 keeps the singular values, 1 makes them alike",
                      low=0, high=1, mergekit=False),
            Parameter("sigma_over", "str", "all", "whether directions that are lacking count in the mean",
                      choices=("all", "rank"), mergekit=False),
            TOLERANCE,
            AVERAGE,
            EXCLUDE,
        ),
        variants=("iso_c", "iso_cts"),
    ),
)  # fmt: skip

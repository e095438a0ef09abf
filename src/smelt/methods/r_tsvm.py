"""R-TSVM (RESM): TSV-Merge with tasks weighted by their outliers, and ranks by their sparsity.

Yang et al., "Mix data or merge models? Balancing the helpfulness, honesty, and harmlessness of large language
model via model merging", 2025, https://arxiv.org/abs/2502.06876. The authors released no code; what is known is
that TSV-Merge (:mod:`smelt.methods.tsv`) gets weights that are aware of outliers and ranks that are aware of
sparsity. The rules below are smelt's reading of that, not the paper's formulas. For each matrix, T tasks,
Delta_t = theta_t - theta_0, r = min(m, n):

1. outliers are the entries with |Delta_t| > mean + ``outlier_sigma`` deviations of |Delta_t|;
2. ``weighting``: ``outlier_mass`` is the outliers' share of the sum of |Delta_t|, ``outlier_count`` their share
   of the entries, ``none`` 1; divided by the mean over the tasks, all 1 where no task has any;
3. ``rank_rule``: ``sparsity`` divides r in proportion to the share of entries above ``sparsity_rel`` times the
   largest of Delta_t, by largest remainders, one direction at least for each; ``energy`` takes the fewest triplets
   that hold ``energy_share`` of the squared norm, r / T at most; ``uniform`` r / T;
4. TSV-Merge with these ranks, and the singular values times the weights.

A task that learnt nothing has weight and rank 0. Whatever is no matrix takes the mean of the deltas, times alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np

from ..kernels.program import Call, Whole
from .registry import EXCLUDE, Citation, Method, Parameter
from .spectral import Matrix, Triplets, triplets
from .task_matrices import ALPHA, AVERAGE, TOLERANCE, averaged, delta_of, held, is_matrix
from .tensors import Tensor
from .tsv import joined, truncation


def merge(tensor: Tensor) -> Call | Whole:
    if not is_truncated(tensor):
        return averaged(tensor)
    rules = Rules(**{rule.name: tensor[rule.name] for rule in fields(Rules)})
    return Whole(partial(merged, rules=rules), {"base": tensor.base, "models": tensor.models, "scale": tensor["alpha"]})


@dataclass(frozen=True)
class Rules:
    """The parameters of that name."""

    weighting: str
    outlier_sigma: float
    rank_rule: str
    sparsity_rel: float
    energy_share: float
    tolerance: float


def merged(base: Any, models: Any, scale: float, rules: Rules) -> Any:
    """The merged matrix (m, n) of T models' matrices (m, n)."""
    weights = relative([outliers(size_of(base, model), rules) for model in models])
    counts = ranks(base, models, rules)
    parts = []
    for model, count, weight in zip(models, counts, weights, strict=True):
        delta = delta_of(base, model)
        found = triplets(delta, count, rules.tolerance)
        if rules.rank_rule == "energy":
            found = energetic(found, rules.energy_share * float((delta * delta).sum()))
        parts.append(found.scaled(weight))
    return joined(base, parts, scale, orthogonal=True)


def ranks(base: Any, models: Any, rules: Rules) -> list[int]:
    """How many triplets of each task are looked at."""
    if rules.rank_rule != "sparsity":
        return [truncation(min(base.shape), len(models))] * len(models)
    return shares([density(size_of(base, model), rules.sparsity_rel) for model in models], min(base.shape))


def size_of(base: Any, model: Any) -> Matrix:
    """|Delta_t|."""
    return np.abs(delta_of(base, model))


# --- the rules ----------------------------------------------------------------------------------------------


def outliers(size: Matrix, rules: Rules) -> float:
    """The weight of a task before it is divided by the mean; 0 without outliers."""
    if rules.weighting == "none":
        return 1.0
    chosen = size > size.mean() + rules.outlier_sigma * size.std()
    share = size[chosen].sum() / max(size.sum(), np.finfo(np.float64).tiny)
    return float(share if rules.weighting == "outlier_mass" else chosen.mean())


def relative(weights: Sequence[float]) -> list[float]:
    """The weights over their mean; all 1 where there is none."""
    mean = sum(weights) / len(weights)
    return [weight / mean for weight in weights] if mean > 0 else [1.0] * len(weights)


def density(size: Matrix, relative_bar: float) -> float:
    """The share of entries that are not next to nothing beside the largest."""
    return float((size > relative_bar * size.max()).mean())


def shares(densities: Sequence[float], rank: int) -> list[int]:
    """``rank`` divided in proportion, by largest remainders, one at least where there is any density."""
    exact = [rank * each / max(sum(densities), np.finfo(np.float64).tiny) for each in densities]
    counts = [int(each) for each in exact]
    order = sorted(range(len(exact)), key=lambda task: (counts[task] - exact[task], task))
    for task in order[: rank - sum(counts) if any(densities) else 0]:
        counts[task] += 1
    for task in order:
        if densities[task] and not counts[task]:
            counts[counts.index(max(counts))] -= 1
            counts[task] = 1
    return counts


def energetic(found: Triplets, energy: float) -> Triplets:
    """The fewest triplets whose squared values add up to ``energy``; all where they do not."""
    held_by = np.cumsum(found.sigma * found.sigma)
    return found.first(int(np.searchsorted(held_by, energy)) + 1)


def is_truncated(tensor: Tensor) -> bool:
    """Whether a tensor is taken apart: each task needs one direction at least."""
    return is_matrix(tensor) and min(tensor.shape) >= tensor.size


def holds(tensor: Tensor) -> tuple[int, int]:
    return held(tensor, 4 * (tensor.size + 1) + 38, 5.8) if is_truncated(tensor) else (1, 0)


METHODS = (
    Method(
        name="r_tsvm",
        title="R-TSVM (RESM), reweighted task singular vectors",
        summary="TSV-Merge with tasks weighted by outliers and ranks by sparsity",
        advice="For preference-tuned models (helpful, honest, harmless) of one base; rules are smelt's reading.",
        citation=Citation(
            "Mix data or merge models? Balancing the helpfulness, honesty, and harmlessness of large language model "
            "via model merging", "Yang et al.", "2025", "https://arxiv.org/abs/2502.06876",
        ),
        merge=merge,
        holds=holds,
        parameters=(
            ALPHA,
            Parameter("weighting", "str", "outlier_mass", "what the singular values of a task are weighted by",
                      choices=("outlier_mass", "outlier_count", "none"), mergekit=False),
            Parameter("outlier_sigma", "float", 3.0, "outliers lie so many deviations above the mean: 2 to 6", low=0,
                      mergekit=False, when=("weighting", ("outlier_mass", "outlier_count"))),
            Parameter("rank_rule", "str", "sparsity", "what the rank of a task follows",
                      choices=("sparsity", "uniform", "energy"), mergekit=False),
            Parameter("sparsity_rel", "float", 0.01, "entries up to this share of the largest count as zero", low=0,
                      high=0.999, mergekit=False, when=("rank_rule", ("sparsity",))),
            Parameter("energy_share", "float", 0.9, "share of the squared norm that is kept", low=0, high=1,
                      open_low=True, mergekit=False, when=("rank_rule", ("energy",))),
            TOLERANCE,
            AVERAGE,
            EXCLUDE,
        ),
    ),
)  # fmt: skip

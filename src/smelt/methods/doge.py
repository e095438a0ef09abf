"""DOGE: add one correction to all task vectors, found by descent that leaves what they share alone.

Wei et al., "Modeling multi-task model merging as adaptive projective gradient descent", ICML 2025,
https://arxiv.org/abs/2501.01230; the rule is that of the code which the authors gave to fusion_bench.

    lambda_i = lambda / |tau_i|,   theta = theta_0 + sum_i lambda_i (tau_i + D) m_i

for every matrix (out, in) of an attention or feed-forward block; other tensors stay the base's. D makes

    L(D) = sum_j sum_rows (tau_j . (tau_j - sum_i lambda_i tau_i - sum_i lambda_i D))^2

small by Adam from 0, with gradients (1 - B B^T) dL/dD: B holds leading left singular vectors of all task vectors'
leading ones. m_i keeps the largest elements of tau_i, by one threshold over all these matrices of a model.

Adam divides gradients by their size only where this is well above 1e-8, and they are cubic in tau: the result depends
on how large the task vectors are, unless they are normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ..kernels.program import Copy, Rank, Whole, call
from .descent import Matrix, Single, adam, strips
from .interference import linear_weight, squared_norm
from .registry import EXCLUDE, Citation, Method, Parameter, Steps
from .spectral import triplets
from .task_matrices import at_most
from .tensors import Model, Tensor, delta


def survey(model: Model) -> Steps:
    """Each model's smallest magnitude that is kept, over all matrices that are merged; None: all are kept."""
    chosen = [tensor for tensor in model.tensors if linear_weight(tensor)]
    count = sum(tensor.count for tensor in chosen)
    rank = count - int(count * model["density"])
    if not rank:
        return None
    changes = ([call(delta, base=tensor.base, model=tensor.models[i]) for tensor in chosen] for i in range(model.size))
    return (yield tuple(Rank(tuple(calls), rank) for calls in changes))


def merge(tensor: Tensor) -> Copy | Whole:
    assert tensor.base is not None
    if tensor["lambda"] == 0 or not linear_weight(tensor):
        return Copy(tensor.base)
    bars = (0.0,) * tensor.size if tensor.survey is None else tuple(tensor.survey)
    return Whole(
        partial(corrected, options=tensor.shared), {"base": tensor.base, "models": tensor.models, "bars": bars}
    )


def corrected(base: Any, models: tuple[Any, ...], bars: tuple[float, ...], options: Mapping[str, Any]) -> Matrix:
    """theta (out, in) in fp64; ``bars`` are the thresholds of the masks, in the precision of the models."""
    kept = [np.abs(model - base) >= bar for model, bar in zip(models, bars, strict=True)]
    changes = [np.subtract(model, base, dtype=np.float64) for model in models]
    norms = [float(np.sqrt(squared_norm(change))) for change in changes]
    learnt = [i for i, norm in enumerate(norms) if norm]
    if not learnt:
        return np.asarray(base, np.float64)
    common = options["lambda"] * (sum(norms) / len(learnt) if options["relative"] else 1.0)
    factors = [common / norms[i] for i in learnt]
    moved = _correction([changes[i] for i in learnt], factors, len(models), options)
    out = np.asarray(base, np.float64).copy()
    for factor, i in zip(factors, learnt, strict=True):
        changes[i] += moved
        changes[i] *= factor
        changes[i] *= kept[i]
        out += changes[i]
    return out


def _correction(changes: list[Matrix], factors: list[float], models: int, options: Mapping[str, Any]) -> Matrix:
    """D (out, in)."""
    shared = _shared_directions(changes, models, options["subspace"])
    unit = float(np.sqrt(sum(squared_norm(c) for c in changes) / sum(c.size for c in changes)))
    unit = unit if options["normalise"] else 1.0
    moved = adam(_gradient(changes, factors, unit, shared), changes[0].shape, options["lr"], options["steps"])
    moved *= unit
    return moved


def _gradient(changes: list[Matrix], factors: list[float], unit: float, shared: Matrix) -> Callable[[Single], Single]:
    """That of L of the task vectors over ``unit``, outside the ``shared`` directions, as a function of D.

    What D = 0 has of it is found in fp64, the rest in fp32.
    """
    merged = sum(factor * change for factor, change in zip(factors, changes, strict=True))
    total, parts = sum(factors), strips(changes[0].shape)
    fixed = np.zeros_like(changes[0])
    for change in changes:
        fixed += np.einsum("ri,ri->r", change, change - merged)[:, None] * change
    fixed -= shared @ (shared.T @ fixed)
    fixed *= -2 * total / unit**3
    start, narrow = np.asarray(fixed, np.float32), np.asarray(shared, np.float32)
    rows = np.stack([np.asarray(change / unit, np.float32) for change in changes], axis=1)

    def gradient(way: Single) -> Single:
        slope = np.empty_like(way)
        for part in parts:
            along = rows[part] @ way[part][:, :, None]
            along *= 2 * total * total
            slope[part] = (along.transpose(0, 2, 1) @ rows[part])[:, 0]
        slope -= narrow @ (narrow.T @ slope)
        slope += start
        return slope

    return gradient


def _shared_directions(changes: list[Matrix], models: int, subspace: int) -> Matrix:
    """B (out, k): the k leading left singular vectors, k = min(out, in) / subspace, of the leading ones of each."""
    rank = min(changes[0].shape)
    leading = [triplets(change, rank // models).left for change in changes]
    return triplets(np.concatenate(leading, axis=1), rank // subspace).left


def holds(tensor: Tensor) -> tuple[int, int]:
    """In turns: the task vectors and a decomposition, the task vectors twice and the work of descent."""
    if not linear_weight(tensor):
        return 1, 0
    length = min(tensor.shape)
    decomposed = (13 * tensor.size + 22) * tensor.count + 32 * length * length
    return at_most(tensor, decomposed, (17 * tensor.size + 43) * tensor.count)


METHODS = (
    Method(
        name="doge",
        title="DOGE",
        summary="add a correction to all task vectors, found by descent outside what they share",
        advice="For several fine-tunes of one base, without data; tune lambda, or set relative and start at 0.3.",
        citation=Citation(
            "Modeling multi-task model merging as adaptive projective gradient descent", "Wei et al.", "ICML 2025",
            "https://arxiv.org/abs/2501.01230",
        ),
        merge=merge,
        survey=survey,
        passes=lambda parameters: (int(parameters["density"] < 1), 0),
        searches=lambda tensor: tensor.size,
        holds=holds,
        min_models=2,
        parameters=(
            Parameter("lambda", "float", 0.07, "norm that each matrix of each task vector gets", low=0),
            Parameter("relative", "bool", False, "lambda is in units of the mean norm of a matrix's task vectors"),
            Parameter("density", "float", 0.3, "share of each task vector that is kept, the largest elements", low=0,
                      high=1),
            Parameter("subspace", "int", 6, "the gradient avoids the rank over this many shared directions", low=1),
            Parameter("steps", "int", 400, "steps of Adam", low=0),
            Parameter("lr", "float", 1e-4, "size of a step", low=0),
            Parameter("normalise", "bool", False, "descend on task vectors divided by their root mean square"),
            EXCLUDE,
        ),
    ),
)  # fmt: skip

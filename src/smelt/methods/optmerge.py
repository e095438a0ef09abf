"""OptMerge: WUDI on the leading singular directions of each task vector.

Wei et al., "Unifying multimodal large language model capabilities and modalities via model merging", ICLR 2026,
https://arxiv.org/abs/2505.19892. The loss and its G and H: see :mod:`smelt.methods.interference`; with
k = int(min(out, in) / n) and the mean task vector M,

    P_i = the k leading rows of S_i V_i^T, of tau_i = U_i S_i V_i^T
    T_i = M + (tau_i - M cut to rank k)     where all weights were tuned (``mode: full``), or
    T_i = tau_i cut to rank k               where adapters were (``mode: lora``).

``full`` takes steps of Adam from the sum of the task vectors; ``lora`` takes steps of descent with momentum from their
mean, which keeps their size, all at once in the eigenbasis of G. ``auto``: lora for a matrix whose task vectors all
have less than a quarter of full rank, singular values below a thousandth of the largest left aside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from ..kernels.program import Call, Copy, Whole, call
from .descent import Matrix, adam, momentum_share
from .interference import Term, quadratic, squared_norm, task_vector
from .registry import LAMBDA, Citation, Method, Parameter
from .spectral import triplets
from .task_arithmetic import add_task_vectors
from .tensors import Tensor

#: A singular value below this share of the largest is noise of 16-bit weights.
_NOISE = 1e-3


def merge(tensor: Tensor) -> Call | Copy | Whole:
    assert tensor.base is not None
    if tensor["lambda"] == 0:
        return Copy(tensor.base)
    if len(tensor.shape) == 2:
        return Whole(partial(optimised, options=tensor.shared), {"base": tensor.base, "models": tensor.models})
    weights = (1 / tensor.size,) * tensor.size
    return call(add_task_vectors, base=tensor.base, models=tensor.models, weights=weights, scale=tensor["lambda"])


def optimised(base: Any, models: tuple[Any, ...], options: Mapping[str, Any]) -> Matrix:
    """theta_0 + lambda W for a matrix (out, in), in fp64."""
    changes = [task_vector(base, model) for model in models]
    share = 1 / len(changes) if options["truncate_rank_ratio"] is None else options["truncate_rank_ratio"]
    rank = int(min(base.shape) * share)
    tuned = options["mode"] == "full" or (options["mode"] == "auto" and not all(map(_adapted, changes)))
    solve = _from_sum if tuned else _from_mean
    return np.asarray(base + options["lambda"] * solve(changes, rank, options), np.float64)


def _adapted(change: Matrix) -> bool:
    """Whether the task vector is of low rank."""
    return bool(triplets(change, tolerance=_NOISE).rank < min(change.shape) / 4)


def _from_sum(changes: list[Matrix], rank: int, options: Mapping[str, Any]) -> Matrix:
    """W by Adam, its targets cut around the mean."""
    total = np.add.reduce(changes)
    form = quadratic(_terms(changes, rank, total / len(changes)), rank * len(changes), total.shape)
    return adam(total, form.gradient, 1e-5 if options["lr"] is None else options["lr"], options["iter_num"])


def _from_mean(changes: list[Matrix], rank: int, options: Mapping[str, Any]) -> Matrix:
    """W by descent with momentum."""
    mean = np.add.reduce(changes) / len(changes)
    form = quadratic(_terms(changes, rank, np.zeros_like(mean)), rank * len(changes), mean.shape)
    spectrum = form.spectrum()
    rate = 1e-4 if options["lr"] is None else options["lr"]
    shares = momentum_share(2 * spectrum.values, rate, options["momentum"], options["iter_num"])
    return form.moved(mean, spectrum, shares)


def _terms(changes: list[Matrix], rank: int, center: Matrix) -> Iterator[Term]:
    """One per model that changed this matrix: targets are cut to ``rank`` around ``center``."""
    for change in changes:
        if size := squared_norm(change):
            leading = triplets(change, rank)
            target = center + triplets(change - center, rank).matrix()
            yield Term(1 / size, target, leading.sigma[:, None] * leading.right.T)


def holds(tensor: Tensor) -> tuple[int, int]:
    """The task vectors, the work of descent and of decompositions, and three matrices (in, in) or less."""
    if len(tensor.shape) != 2 or not tensor.count:
        return 1, 0
    return tensor.count, 8 * (tensor.size + 10) + 24 * tensor.shape[1] // tensor.shape[0]


#: What the authors leave as it is: encoders of other modalities, embeddings, heads, norms and biases.
_LEFT = (r"vision_model\.", r"visual\.", r".*embed_tokens", r".*lm_head", r".*norm", r".*bias")

METHODS = (
    Method(
        name="optmerge",
        title="OptMerge",
        summary="WUDI on the leading singular directions of each task vector",
        advice="For fine-tunes or folded LoRA of one multimodal model; tune lambda between 0.1 and 1.",
        citation=Citation(
            "Unifying multimodal large language model capabilities and modalities via model merging", "Wei et al.",
            "ICLR 2026", "https://arxiv.org/abs/2505.19892",
        ),
        merge=merge,
        holds=holds,
        parameters=(
            LAMBDA,
            Parameter("mode", "str", "auto", "what was tuned: all weights, adapters, or as each matrix shows",
                      choices=("auto", "full", "lora")),
            Parameter("truncate_rank_ratio", "float", None, "share of the rank that counts; default: 1 / models",
                      low=0, high=1),
            Parameter("iter_num", "int", 300, "steps", low=0),
            Parameter("lr", "float", None, "size of a step; default: 1e-5 (full), 1e-4 (lora)", low=0),
            Parameter("momentum", "float", 0.9, "of descent from the mean", low=0, high=1,
                      when=("mode", ("auto", "lora"))),
            Parameter("exclude", "strings", _LEFT,
                      "regular expressions, anchored at the start: such tensors are not merged"),
        ),
    ),
)  # fmt: skip

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

``factors`` is for adapters of one language model, one per modality, whose factors A and B are merged each as a matrix
of its own: as ``lora``, with P_i = tau_i whole and T_i cut to a fifth of the rank. The factors themselves are the task
vectors: there is no base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from ..errors import UsageError
from ..kernels.program import Call, Copy, Whole, call
from .descent import Matrix, adam, momentum_share
from .interference import Term, moved, quadratic, slope, squared_norm, task_vector
from .linear import weighted_sum
from .low_rank import holds_core, is_low_rank, is_unchanged, merged_in_core
from .registry import LAMBDA, Citation, Method, Parameter
from .spectral import triplets
from .task_arithmetic import add_task_vectors
from .task_matrices import held
from .tensors import Tensor

#: A singular value below this share of the largest is noise of 16-bit weights.
_NOISE = 1e-3


def merge(tensor: Tensor) -> Call | Copy | Whole:
    if tensor.base is None and tensor["mode"] != "factors":
        raise UsageError("optmerge: give a base (only with mode: factors there is none)")
    if tensor.base is not None and (tensor["lambda"] == 0 or is_unchanged(tensor)):
        return Copy(tensor.base)
    if len(tensor.shape) == 2:
        function = partial(optimised, options=tensor.shared, side=min(tensor.shape))
        given = {} if tensor.base is None else {"base": tensor.base}
        if tensor.ranks:
            in_core = partial(merged_in_core, function=function)
            return Whole(in_core, {**given, "changes": tensor.changes}, strips=True)
        return Whole(function, {**given, "models": tensor.models})
    if tensor.base is None:
        return call(weighted_sum, models=tensor.models, weights=(tensor["lambda"] / tensor.size,) * tensor.size)
    weights = (1 / tensor.size,) * tensor.size
    return call(add_task_vectors, base=tensor.base, models=tensor.models, weights=weights, scale=tensor["lambda"])


def optimised(models: tuple[Any, ...], options: Mapping[str, Any], side: int, base: Any = 0.0) -> Matrix:
    """theta_0 + lambda W for a matrix (out, in), in fp64; full rank is ``side``."""
    changes = [task_vector(base, model) for model in models]
    mode, share = options["mode"], options["truncate_rank_ratio"]
    if share is None:
        share = 1 / 5 if mode == "factors" else 1 / len(changes)
    rank = int(side * share)
    tuned = mode == "full" or (mode == "auto" and not all(_adapted(change, side) for change in changes))
    solve = _from_sum if tuned else _from_mean
    return np.asarray(base + options["lambda"] * solve(changes, rank, options), np.float64)


def _adapted(change: Matrix, side: int) -> bool:
    """Whether the task vector is of low rank."""
    return bool(triplets(change, tolerance=_NOISE).rank < side / 4)


def _from_adapters(tensor: Tensor) -> bool:
    """Whether the task vectors are known to be of low rank, and treated so."""
    few = max(tensor.ranks) < min(tensor.shape, default=0) / 4
    return len(tensor.shape) == 2 and (tensor["mode"] == "lora" or (tensor["mode"] == "auto" and few))


def _from_sum(changes: list[Matrix], rank: int, options: Mapping[str, Any]) -> Matrix:
    """W by Adam, its targets cut around the mean."""
    total, rate = np.add.reduce(changes), 1e-5 if options["lr"] is None else options["lr"]
    terms = _terms(changes, rank, total / len(changes))
    way = adam(slope(terms, rank * len(changes), total), total.shape, rate, options["iter_num"])
    way += total
    return way


def _from_mean(changes: list[Matrix], rank: int, options: Mapping[str, Any]) -> Matrix:
    """W by descent with momentum."""
    mean, whole = np.add.reduce(changes) / len(changes), options["mode"] == "factors"
    rows = len(changes) * (len(mean) if whole else rank)
    form = quadratic(_terms(changes, rank, np.zeros_like(mean), whole), rows, mean.shape)
    spectrum = form.spectrum()
    rate = (5e-2 if whole else 1e-4) if options["lr"] is None else options["lr"]
    shares = momentum_share(2 * spectrum.values, rate, options["momentum"], options["iter_num"])
    return moved(form.pull, mean, spectrum, shares)


def _terms(changes: list[Matrix], rank: int, center: Matrix, whole: bool = False) -> Iterator[Term]:
    """One per model that changed this matrix: targets are cut to ``rank`` around ``center``, and probes (not ``whole``)
    to ``rank``."""
    for change in changes:
        if size := squared_norm(change):
            target = center + triplets(change - center, rank).matrix()
            yield Term(1 / size, target, change if whole else _leading_rows(change, rank))


def _leading_rows(change: Matrix, rank: int) -> Matrix:
    """S V^T."""
    found = triplets(change, rank)
    return np.asarray(found.sigma[:, None] * found.right.T)


def holds(tensor: Tensor) -> tuple[int, int]:
    """The task vectors, the work of descent and of decompositions, and G."""
    if len(tensor.shape) != 2 or not tensor.count or is_unchanged(tensor):
        return 1, 0
    if tensor.ranks:
        return holds_core(tensor)
    return held(tensor, 20 * tensor.size + 35, 5.5)


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
        base="optional",
        holds=holds,
        low_rank=lambda tensor: is_low_rank(tensor, _from_adapters(tensor)),
        parameters=(
            LAMBDA,
            Parameter("mode", "str", "auto", "what was tuned: all weights, adapters, or as each matrix shows; "
                      "factors: the models are adapters' factors", choices=("auto", "full", "lora", "factors")),
            Parameter("truncate_rank_ratio", "float", None, "share of the rank that counts; default: 1 / models, 1/5 "
                      "(factors)",
                      low=0, high=1),
            Parameter("iter_num", "int", 300, "steps", low=0),
            Parameter("lr", "float", None, "size of a step; default: 1e-5 (full), 1e-4 (lora), 0.05 (factors)", low=0),
            Parameter("momentum", "float", 0.9, "of descent from the mean", low=0, high=1,
                      when=("mode", ("auto", "lora", "factors"))),
            Parameter("exclude", "strings", _LEFT,
                      "regular expressions, anchored at the start: such tensors are not merged"),
        ),
    ),
)  # fmt: skip

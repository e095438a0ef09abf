"""The combination types of PEFT's ``add_weighted_adapter`` (release 0.21), with its numbers.

Mangrulkar et al., "PEFT: state-of-the-art parameter-efficient fine-tuning methods", https://github.com/huggingface/peft.
With c_i = weight times scaling, and r the new rank:

- ``cat``: B = [B_1 B_2 ..], A = [c_1 A_1; c_2 A_2; ..], which is the exact sum;
- ``linear``: B = sum sqrt|c_i| B_i, A = sum sign(c_i) sqrt|c_i| A_i, which is not: B_i meets A_j, too;
- ``ties``, ``dare_linear``, ``dare_ties``, ``magnitude_prune``: a rule for weighted tensors, on B and A apart;
- ``svd``: the nearest of rank r to the exact sum, and ``.._svd`` to what a rule makes of the whole matrices.

A rule prunes, then combines. Magnitude: the int(density n) largest stay, of equal ones those that come first. Chance:
each stays with probability ``density`` and is divided by it; the draws are smelt's own, functions of seed, tensor and
place of the adapter, so that PEFT's own differ. TIES: the sign of an element is that of the pruned values' sum
("total") or of their signs' ("frequency"), 0 counting as positive; the weighted values of that sign are summed and
divided by their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import copysign, sqrt
from typing import Literal

import numpy as np

from ..errors import OperationFailed, show
from ..kernels.random import drawn, key_of, words
from .factored import Term, summed
from .lowrank import Array, Difference, Limits, LowRank, low_rank

Pruning = Literal["none", "magnitude", "random"]

#: By name: how a rule prunes, and whether it elects signs.
_RULES: dict[str, tuple[Pruning, bool]] = {
    "linear": ("none", False), "ties": ("magnitude", True), "dare_linear": ("random", False),
    "dare_ties": ("random", True), "magnitude_prune": ("magnitude", False),
}  # fmt: skip
NAMES = ("cat", "linear", *list(_RULES)[1:], "svd", *(f"{name}_svd" for name in list(_RULES)[1:]))


@dataclass(frozen=True)
class Combination:
    """One of PEFT's types with its options. ``rank`` is its ``svd_rank``."""

    name: str
    rank: int | None = None
    density: float | None = None
    majority_sign_method: Literal["total", "frequency"] | None = None
    seed: int = 0

    def problems(self) -> Iterator[str]:
        """What is wrong with the options, and those that would have no effect."""
        if self.name not in NAMES:
            yield f"combination_type must be one of {', '.join(NAMES)}, not {show(self.name)}"
            return
        pruning, elects = self._rule
        if pruning == "none" and self.density is not None:
            yield f"density has no effect with combination_type: {self.name}"
        elif pruning != "none" and self.density is None:
            yield f"combination_type: {self.name} needs density, the share of values to keep, such as 0.5"
        elif self.density is not None and not 0 < self.density <= 1:
            yield f"density must lie in (0, 1], not {self.density}"
        if not elects and self.majority_sign_method is not None:
            yield f"majority_sign_method has no effect with combination_type: {self.name}"
        elif self.majority_sign_method not in (None, "total", "frequency"):
            yield f"majority_sign_method must be total or frequency, not {show(self.majority_sign_method)}"
        if self.rank is not None and not self.decomposes:
            yield f"rank has no effect with combination_type: {self.name}"

    @property
    def _rule(self) -> tuple[Pruning, bool]:
        return _RULES.get(self.name.removesuffix("_svd"), ("none", False))

    @property
    def decomposes(self) -> bool:
        return self.name.endswith("svd")

    @property
    def whole_matrices(self) -> bool:
        """Whether whole matrices are made on the way."""
        return self.name.endswith("_svd")

    @property
    def equal_ranks(self) -> bool:
        """Whether the adapters' factors are added up, so that they must be of equal shape."""
        return self.name in _RULES

    def new_rank(self, ranks: Sequence[int]) -> int:
        """The rank of the result from those of the adapters."""
        return sum(ranks) if self.name == "cat" else self.rank or max(ranks)

    def merge(self, terms: Sequence[Term], places: Sequence[int], tensor: str) -> tuple[Array, Array]:
        """B and A (fp32) of the terms; ``places`` are those of their adapters, ``tensor`` names the draws."""
        if self.name == "cat":
            weighted = [single(term.a) * np.float32(term.factor) for term in terms]
            return np.concatenate([single(term.b) for term in terms], axis=1), np.concatenate(weighted)
        if self.decomposes:
            found = self._decomposed(terms, places, tensor)
            return single(found.left * found.sigma), single(found.right)
        roots = [sqrt(abs(term.factor)) for term in terms]
        signed = [copysign(root, term.factor) for root, term in zip(roots, terms, strict=True)]
        b = self._ruled([single(term.b) for term in terms], roots, places, f"{tensor}.lora_B")
        return b, self._ruled([single(term.a) for term in terms], signed, places, f"{tensor}.lora_A")

    def _decomposed(self, terms: Sequence[Term], places: Sequence[int], tensor: str) -> LowRank:
        limits = Limits(self.new_rank([term.b.shape[1] for term in terms]))
        if not self.whole_matrices:
            return summed(terms, limits)
        matrices = [single(term.b) @ single(term.a) * np.float32(term.scaling) for term in terms]
        merged = self._ruled(matrices, [term.weight for term in terms], places, tensor)
        if not np.isfinite(merged).all():
            raise too_large(tensor, "float32")
        return low_rank(Difference(merged, np.zeros_like(merged)), limits)

    def _ruled(self, tensors: Sequence[Array], weights: Sequence[float], places: Sequence[int], name: str) -> Array:
        """The rule on tensors of one shape; in fp32, as PEFT does it."""
        pruning, elects = self._rule
        density = 1.0 if self.density is None else self.density
        if pruning == "magnitude":
            tensors = [largest(tensor, density) for tensor in tensors]
        elif pruning == "random":
            keys = [key_of(self.seed, name, place) for place in places]
            tensors = [drawn_from(tensor, density, key) for tensor, key in zip(tensors, keys, strict=True)]
        return (
            elected(tensors, weights, self.majority_sign_method == "frequency") if elects else total(tensors, weights)
        )


def too_large(module: str, dtype: str) -> OperationFailed:
    """For values beyond the range of ``dtype``."""
    return OperationFailed(f"module {show(module)}: the merged values exceed {dtype}: lower the weights")


def single(values: Array) -> Array:
    return values.astype(np.float32)


def largest(values: Array, density: float) -> Array:
    """The int(density n) elements of largest magnitude, zeros elsewhere; of equal ones those that come first."""
    count, sizes = int(density * values.size), np.abs(values).reshape(-1)
    if count == 0 or count == values.size:
        return values if count else np.zeros_like(values)
    bar = np.partition(sizes, values.size - count)[values.size - count]
    kept = sizes > bar
    kept[np.flatnonzero(sizes == bar)[: count - int(kept.sum())]] = True
    return np.asarray(values * kept.reshape(values.shape))


def drawn_from(values: Array, density: float, key: tuple[int, int]) -> Array:
    """Each element with probability ``density``, divided by it; zeros elsewhere."""
    kept = drawn(words(key, 0, values.size), density).reshape(values.shape)
    return np.asarray(values * kept / np.float32(density))


def total(tensors: Sequence[Array], weights: Sequence[float]) -> Array:
    """The weighted sum, in order."""
    result = np.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        result += np.float32(weight) * tensor
    return result


def elected(tensors: Sequence[Array], weights: Sequence[float], by_frequency: bool) -> Array:
    """The weighted values whose sign is the elected one, over their number."""
    votes = total([np.sign(tensor) for tensor in tensors] if by_frequency else tensors, [1.0] * len(tensors))
    direction = np.where(votes >= 0, 1, -1)
    agreeing = [np.sign(tensor) == direction for tensor in tensors]
    count = np.maximum(1, np.sum(agreeing, axis=0)).astype(np.float32)
    merged = total([tensor * agrees for tensor, agrees in zip(tensors, agreeing, strict=True)], weights)
    return np.asarray(merged / count)

"""The straightforward way to do what the matrix methods do: full SVDs, loops of Adam, explicit inverses.

Written from the papers' descriptions for one matrix (m, n), in the dtype of its arguments: fp32, as the authors'
codes run, is what smelt is timed against; fp64 gives the reference that both are held against. Every function takes
the base, the models and, where the method has them, Gram matrices, and returns the merged matrix minus the base (the
matrix itself for methods without a base).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[Any]


def svd(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    return left, sigma, right


def cut(matrix: Matrix, rank: int) -> Matrix:
    left, sigma, right = svd(matrix)
    return (left[:, :rank] * sigma[:rank]) @ right[:rank]


def polar(matrix: Matrix) -> Matrix:
    left, _, right = svd(matrix)
    return left @ right


def deltas_of(base: Matrix, models: Sequence[Matrix]) -> list[Matrix]:
    return [model - base for model in models]


# --- singular vectors ---------------------------------------------------------------------------------------


def tsv(base: Matrix, models: Sequence[Matrix]) -> Matrix:
    rank = min(base.shape) // len(models)
    return side_by_side([svd(delta) for delta in deltas_of(base, models)], [rank] * len(models))


def side_by_side(found: Sequence[tuple[Matrix, Matrix, Matrix]], ranks: Sequence[int]) -> Matrix:
    left = np.concatenate([u[:, :k] for (u, _, _), k in zip(found, ranks, strict=True)], axis=1)
    sigma = np.concatenate([s[:k] for (_, s, _), k in zip(found, ranks, strict=True)])
    right = np.concatenate([v[:k] for (_, _, v), k in zip(found, ranks, strict=True)])
    return (polar(left) * sigma) @ polar(right)


def r_tsvm(base: Matrix, models: Sequence[Matrix]) -> Matrix:
    """Weights by the mass of outliers, ranks uniform."""
    deltas = deltas_of(base, models)
    sizes = [np.abs(delta).astype(np.float64) for delta in deltas]
    masses = np.array([size[size > size.mean() + 3 * size.std()].sum() / size.sum() for size in sizes])
    weights = (masses / masses.mean()).astype(base.dtype)
    found = [(u, weight * s, v) for (u, s, v), weight in zip(map(svd, deltas), weights, strict=True)]
    return side_by_side(found, [min(base.shape) // len(models)] * len(models))


def iso(base: Matrix, models: Sequence[Matrix]) -> Matrix:
    left, sigma, right = svd(sum(deltas_of(base, models)))
    return (left * sigma.mean()) @ right


def iso_cts(base: Matrix, models: Sequence[Matrix]) -> Matrix:
    deltas, rank = deltas_of(base, models), min(base.shape)
    own = round((rank - int(rank * 0.8)) / len(models))
    common = rank - own * len(models)
    left, sigma, right = (part[..., :common] if part.ndim < 2 else part for part in svd(sum(deltas)))
    left, right = left[:, :common], right[:common]
    special = [svd(delta - left @ (left.T @ delta)) for delta in deltas]
    lefts = np.concatenate([*(u[:, :own] for u, _, _ in special), left], axis=1)
    rights = np.concatenate([*(v[:own] for _, _, v in special), right])
    level = np.concatenate([*(s[:own] for _, s, _ in special), sigma]).mean()
    return level * (polar(lefts) @ polar(rights))


def knots(base: Matrix, models: Sequence[Matrix]) -> Matrix:
    left, sigma, right = svd(np.concatenate(deltas_of(base, models), axis=1))
    own = np.split(sigma[:, None] * right, len(models), axis=1)
    bars = [np.sort(np.abs(c), axis=None)[c.size - int(c.size * 0.2) - 1] for c in own]
    kept = [np.where(np.abs(c) >= bar, c, 0) for c, bar in zip(own, bars, strict=True)]
    sign = np.sign(sum(kept))
    agreeing = [np.where(c * sign > 0, c, 0) for c in kept]
    count = sum((c != 0).astype(base.dtype) for c in agreeing)
    return left @ (sum(agreeing) / np.maximum(count, 1))


def opcm(base: Matrix, models: Sequence[Matrix]) -> Matrix:
    first, *others = deltas = deltas_of(base, models)
    total = first
    for delta in others:
        left, sigma, right = np.linalg.svd(total)
        rank = int((np.cumsum(sigma) <= 0.5 * sigma.sum()).sum())
        inner = left.T @ delta @ right.T
        inner[:rank, :rank] = 0
        total = total + left @ inner @ right
    return total * (np.mean([np.linalg.norm(delta) for delta in deltas]) / np.linalg.norm(total))


def lore(base: Matrix, models: Sequence[Matrix], threshold: float, rounds: int) -> Matrix:
    changes = [np.zeros_like(base) for _ in models]
    for _ in range(rounds):
        start = sum(model - change for model, change in zip(models, changes, strict=True)) / len(models)
        changes = [shrunk(model - start, threshold) for model in models]
    return start + sum(changes) / len(models)


def shrunk(matrix: Matrix, threshold: float) -> Matrix:
    left, sigma, right = svd(matrix)
    return (left * np.maximum(sigma - threshold, 0)) @ right


# --- descent ------------------------------------------------------------------------------------------------


def adam(start: Matrix, gradient: Callable[[Matrix], Matrix], rate: float, steps: int) -> Matrix:
    place, mean, square = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for step in range(1, steps + 1):
        slope = gradient(place)
        mean = 0.9 * mean + 0.1 * slope
        square = 0.999 * square + 0.001 * slope * slope
        place = place - rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return place


def wudi(base: Matrix, models: Sequence[Matrix], steps: int) -> Matrix:
    deltas = deltas_of(base, models)
    weights = [1 / (delta * delta).sum() for delta in deltas]

    def gradient(place: Matrix) -> Matrix:
        terms = (2 * w * (((place - delta) @ delta.T) @ delta) for w, delta in zip(weights, deltas, strict=True))
        return sum(terms)

    return adam(sum(deltas), gradient, 1e-5, steps)


def aswudi(base: Matrix, models: Sequence[Matrix]) -> Matrix:
    deltas = deltas_of(base, models)
    weights = [1 / (delta * delta).sum() for delta in deltas]
    gram = sum(weight * (delta.T @ delta) for weight, delta in zip(weights, deltas, strict=True))
    pull = sum(weight * delta @ (delta.T @ delta) for weight, delta in zip(weights, deltas, strict=True))
    vectors, values, _ = svd(gram)
    rank = int(np.ceil(np.sqrt(values).sum() ** 2 / values.sum()))
    leading, start = vectors[:, :rank], sum(deltas)
    return start + ((pull @ leading) / values[:rank] - start @ leading) @ leading.T


def doge(base: Matrix, models: Sequence[Matrix], steps: int) -> Matrix:
    deltas, rank = deltas_of(base, models), min(base.shape)
    factors = [0.07 / np.sqrt((delta * delta).sum()) for delta in deltas]
    leading = np.concatenate([svd(delta)[0][:, : rank // len(models)] for delta in deltas], axis=1)
    shared = svd(leading)[0][:, : rank // 6]
    projector = np.eye(len(base), dtype=base.dtype) - shared @ shared.T
    merged, total = sum(f * delta for f, delta in zip(factors, deltas, strict=True)), sum(factors)

    def gradient(place: Matrix) -> Matrix:
        gaps = ((delta * (delta - merged - total * place)).sum(axis=1, keepdims=True) for delta in deltas)
        return projector @ sum(-2 * total * gap * delta for gap, delta in zip(gaps, deltas, strict=True))

    moved = adam(np.zeros_like(base), gradient, 1e-4, steps)
    kept = [np.abs(d) >= np.sort(np.abs(d), axis=None)[d.size - int(d.size * 0.3) - 1] for d in deltas]
    return sum(f * (delta + moved) * k for f, delta, k in zip(factors, deltas, kept, strict=True))


def optmerge(base: Matrix, models: Sequence[Matrix], steps: int) -> Matrix:
    deltas, rank = deltas_of(base, models), min(base.shape) // len(models)
    mean = sum(deltas) / len(deltas)
    weights = [1 / (delta * delta).sum() for delta in deltas]
    targets = [mean + cut(delta - mean, rank) for delta in deltas]
    probes = [s[:rank, None] * v[:rank] for _, s, v in map(svd, deltas)]

    def gradient(place: Matrix) -> Matrix:
        terms = zip(weights, targets, probes, strict=True)
        return sum(2 * weight * (((place - target) @ probe.T) @ probe) for weight, target, probe in terms)

    return adam(sum(deltas), gradient, 1e-5, steps)


# --- least squares, columns ---------------------------------------------------------------------------------


def regmean(base: Matrix, models: Sequence[Matrix], grams: Sequence[Matrix]) -> Matrix:
    shrunk = [0.9 * gram + 0.1 * np.diag(np.diag(gram)) for gram in grams]
    return sum(model @ gram for model, gram in zip(models, shrunk, strict=True)) @ np.linalg.inv(sum(shrunk))


def widen(base: Matrix, models: Sequence[Matrix]) -> Matrix:
    lengths = [np.abs(np.linalg.norm(model, axis=0) - np.linalg.norm(base, axis=0)) for model in models]
    norms = [np.linalg.norm(base, axis=0) * np.linalg.norm(model, axis=0) for model in models]
    turns = [1 - (model * base).sum(axis=0) / norm for model, norm in zip(models, norms, strict=True)]
    found = (scores(lengths, base.dtype) + scores(turns, base.dtype)) / 2
    return sum(delta * share for delta, share in zip(deltas_of(base, models), found, strict=True))


def scores(changes: Sequence[Matrix], dtype: Any) -> Matrix:
    ranks = np.stack([np.argsort(np.argsort(change, kind="stable")) for change in changes]) / len(changes[0])
    powers = np.exp(ranks)
    return np.where(ranks > ranks.mean(axis=1, keepdims=True), 1, powers / powers.sum(axis=0)).astype(dtype)


#: Every method's straightforward way; ``steps`` are fewer than the methods' own, which change nothing in a ratio.
STEPS = 20
PLAIN: dict[str, Callable[..., Matrix]] = {
    "tsv": tsv, "r_tsvm": r_tsvm, "iso": iso, "iso_cts": iso_cts, "knots": knots, "opcm": opcm,
    "lore": partial(lore, threshold=0.1, rounds=3), "wudi": partial(wudi, steps=STEPS), "aswudi": aswudi,
    "doge": partial(doge, steps=STEPS), "optmerge": partial(optmerge, steps=STEPS), "regmean": regmean, "widen": widen,
}  # fmt: skip

"""The election of TIES, element by element: one sign per parameter, and what agrees with it.

Shared arguments: a task vector's element tau counts where it was drawn (``kept``), where |tau - center| >= its
threshold and |tau| < its limit; ``factors`` multiply it; ``fallback`` is the sign where the vote is even.
"""

from __future__ import annotations

from typing import Any

from ..kernels.vocabulary import where


def trimmed(base: Any, model: Any, keep: Any, threshold: Any, center: Any) -> Any:
    tau = model - base
    return where(keep & (abs(tau - center) >= threshold), tau, 0)


def banded(base: Any, model: Any, keep: Any, threshold: Any, center: Any, limit: Any) -> Any:
    """The trimmed task vector without its outliers."""
    return where(abs(model - base) < limit, trimmed(base, model, keep, threshold, center), 0)


def elect_by_mass(base: Any, models: Any, kept: Any, thresholds: Any, centers: Any, factors: Any, fallback: Any) -> Any:
    total = 0
    for model, keep, threshold, center, factor in zip(models, kept, thresholds, centers, factors):  # noqa: B905
        total += factor * trimmed(base, model, keep, threshold, center)
    return sign_of_vote(total, fallback)


def elect_within(
    base: Any, models: Any, kept: Any, thresholds: Any, centers: Any, limits: Any, factors: Any, fallback: Any
) -> Any:
    """The same without outliers."""
    total = 0
    for model, keep, threshold, center, limit, factor in zip(  # noqa: B905
        models, kept, thresholds, centers, limits, factors
    ):
        total += factor * banded(base, model, keep, threshold, center, limit)
    return sign_of_vote(total, fallback)


def sign_of_vote(total: Any, fallback: Any) -> Any:
    return where(total > 0, 1, where(total < 0, -1, fallback))


def mean_of_agreeing(
    base: Any, models: Any, kept: Any, thresholds: Any, centers: Any, limits: Any, factors: Any, weights: Any,
    direction: Any,
) -> Any:  # fmt: skip
    total = 0
    mass = 0
    for model, keep, threshold, center, limit, factor, weight in zip(  # noqa: B905
        models, kept, thresholds, centers, limits, factors, weights
    ):
        value = factor * banded(base, model, keep, threshold, center, limit)
        total += where(value * direction > 0, value, 0)
        mass += where(value * direction > 0, weight, 0)
    return total / where(mass == 0, 1, mass)


def sum_of_agreeing(
    base: Any, models: Any, kept: Any, thresholds: Any, centers: Any, limits: Any, factors: Any, direction: Any
) -> Any:
    total = 0
    for model, keep, threshold, center, limit, factor in zip(  # noqa: B905
        models, kept, thresholds, centers, limits, factors
    ):
        value = factor * banded(base, model, keep, threshold, center, limit)
        total += where(value * direction > 0, value, 0)
    return total


def ties_mean(
    base: Any, models: Any, kept: Any, thresholds: Any, centers: Any, limits: Any, factors: Any, weights: Any,
    fallback: Any, scale: Any,
) -> Any:  # fmt: skip
    direction = elect_within(base, models, kept, thresholds, centers, limits, factors, fallback)
    tau = mean_of_agreeing(base, models, kept, thresholds, centers, limits, factors, weights, direction)
    return base + scale * tau


def ties_sum(
    base: Any, models: Any, kept: Any, thresholds: Any, centers: Any, limits: Any, factors: Any, fallback: Any,
    scale: Any,
) -> Any:  # fmt: skip
    direction = elect_within(base, models, kept, thresholds, centers, limits, factors, fallback)
    return base + scale * sum_of_agreeing(base, models, kept, thresholds, centers, limits, factors, direction)

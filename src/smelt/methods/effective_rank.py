"""How many directions of a spectrum hold what was learnt: rules that need no data.

Those of the closed forms of WUDI (see :mod:`smelt.methods.wudi`). ``values`` are all eigenvalues of a Gram matrix,
descending; with ``pulls`` and ``starts``, the squared norms of H v and of W_0 v per eigenvector v, rules look at the
loss as well. Every rule gives a number of at least 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import ceil, sqrt

import numpy as np

from .descent import Matrix


@dataclass(frozen=True, eq=False)
class Directions:
    """One number per eigenvector, largest eigenvalue first, and the shape of the matrix that they belong to.

    ``squares`` finds ``pulls`` and ``starts``, for the rules that look at them.
    """

    values: Matrix
    shape: tuple[int, int]
    squares: Callable[[], tuple[Matrix, Matrix]]

    @cached_property
    def _squares(self) -> tuple[Matrix, Matrix]:
        return self.squares()

    @property
    def pulls(self) -> Matrix:
        return self._squares[0]

    @property
    def starts(self) -> Matrix:
        return self._squares[1]


def _participation(sizes: Matrix) -> int:
    """(sum x)^2 / sum x^2: as many as there are equal ones."""
    return ceil(float(sizes.sum()) ** 2 / max(float(sizes @ sizes), 1e-300))


def _entropy(sizes: Matrix) -> int:
    shares = sizes[sizes > 0] / sizes.sum()
    return ceil(float(np.exp(-(shares * np.log(shares)).sum())))


def _reaching(sizes: Matrix, share: float) -> int:
    return int((np.cumsum(sizes) / sizes.sum() < share).sum()) + 1


def _optimum(given: Directions) -> Matrix:
    """The squared norm of the loss's minimum along each direction."""
    return np.divide(given.pulls, given.values**2, out=np.zeros_like(given.pulls), where=given.values > 0)


def _hard_threshold(values: Matrix, shape: tuple[int, int]) -> int:
    """Gavish and Donoho, 2014, for unknown noise; the median of Marchenko and Pastur as the authors estimate it."""
    ratio = min(shape) / max(shape)
    middle = sqrt(max((1 - ratio) ** 2 + ratio, 1e-3)) if ratio < 0.9999 else sqrt(2 + sqrt(3))
    best = sqrt(2 * (ratio + 1) + 8 * ratio / (ratio + 1 + sqrt(ratio * ratio + 14 * ratio + 1)))
    sizes = np.sqrt(values)
    return max(int((sizes > best / middle * sizes[len(sizes) // 2]).sum()), 1)


def _losses(given: Directions) -> Matrix:
    """What is left of the loss if the first k directions are solved, k = 0, 1, ...; without the mixed terms."""
    each = given.values**2 * given.starts + given.pulls
    return np.append(np.cumsum(each[::-1])[::-1], 0.0)


def _elbow(given: Directions, share: float) -> int:
    left = _losses(given)
    return int(np.argmax(left <= share * left[0]))


def _risk(given: Directions, factor: float) -> int:
    """The least sum of the loss that is left and ``factor`` times the squared norm of the result."""
    solved = np.append(0.0, np.cumsum(_optimum(given)))
    kept = np.append(np.cumsum(given.starts[::-1])[::-1], 0.0)
    return int(np.argmin(_losses(given) + factor * (solved + kept)))


#: Each rule, of the directions and the one number that some of them look at.
RULES: dict[str, Callable[[Directions, float], int]] = {
    "none": lambda given, level: len(given.values),
    "ratio": lambda given, level: int(len(given.values) * level + 0.999),
    "stable_rank": lambda given, level: ceil(float(((given.values / given.values[0]) ** 2).sum())),
    "entropy": lambda given, level: _entropy(given.values),
    "entropy_sq": lambda given, level: _entropy(given.values**2),
    "participation": lambda given, level: _participation(given.values),
    "participation_sqrt": lambda given, level: _participation(np.sqrt(given.values)),
    "cumvar": lambda given, level: _reaching(given.values, level),
    "gavish_donoho": lambda given, level: _hard_threshold(given.values, given.shape),
    "d_aware_participation_sqrt": lambda given, level: _participation(np.sqrt(_optimum(given))),
    "d_aware_cumvar": lambda given, level: _reaching(_optimum(given), 0.99),
    "d_aware_entropy": lambda given, level: _entropy(_optimum(given)),
    "loss_elbow": _elbow,
    "loss_residual": lambda given, level: _elbow(given, 1 - level),
    "wudi_risk": _risk,
}

#: What the one number is where it is not given.
LEVELS = {"ratio": 0.65, "cumvar": 0.95, "loss_elbow": 0.01, "loss_residual": 0.99, "wudi_risk": 1.0}

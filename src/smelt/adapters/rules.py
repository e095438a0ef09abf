"""What becomes of the factors that several adapters have for a module: three ways to merge them.

- :class:`Exact`: the weighted sum, cut to a rank or an error where one is asked for;
- :class:`Compatible`: one of PEFT's combination types, with its numbers;
- :class:`InCore`: any of smelt's methods, on the small matrices that the factors are in the space they share.

Where they merge a module, ``places`` are those of the terms' adapters, and ``dtype`` is the safetensors code of the
factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import hypot
from typing import Any, NamedTuple

import numpy as np

from ..engine import merge_tensors
from ..kernels.dtypes import rounded
from ..methods import get
from .combinations import Combination
from .factored import EVERYTHING, Term, apart, core_of, outside, rounding, summed
from .lowrank import Array, Limits, LowRank, Matrix, factors


class Result(NamedTuple):
    """Factors as they are to be stored, the norm of what they stand for, and how far they are from it."""

    b: Array
    a: Array
    norm: float
    error: float


@dataclass(frozen=True)
class Exact:
    limits: Limits

    def merge(self, module: str, terms: Sequence[Term], places: Sequence[int], dtype: str) -> Result:
        return _stored(summed(terms, self.limits), dtype)


@dataclass(frozen=True)
class Compatible:
    """PEFT's, padded with zeros to ``rank``; ``scaling`` is what PEFT will multiply the product by."""

    combination: Combination
    rank: int
    scaling: float

    def merge(self, module: str, terms: Sequence[Term], places: Sequence[int], dtype: str) -> Result:
        b, a = self.combination.merge(terms, places, module)
        missing = self.rank - len(a)
        wide = np.pad(b, ((0, 0), (0, missing))), np.pad(a, ((0, missing), (0, 0)))
        b, a = (rounded(factor.astype(np.float64), dtype) for factor in wide)
        exact = summed(terms, EVERYTHING)
        error = apart(exact, self.scaling * b.astype(np.float64), a.astype(np.float64))
        return Result(b, a, exact.norm, error)


@dataclass
class InCore:
    """``method`` with its parameters; for parameters that take a value per model, ``per_model``.

    A module that an adapter lacks is zero in it. Bases are zero, so that what a method merges are the changes.
    """

    method: str
    parameters: Mapping[str, Any]
    per_model: Mapping[str, Sequence[Any]]
    seed: int
    limits: Limits
    merged: Mapping[str, Matrix] = field(default_factory=dict)

    def learn(self, modules: Mapping[str, Mapping[int, Matrix]], count: int) -> None:
        """Run the method on the cores of all modules, by the places of the ``count`` adapters that have them.

        All at once, since it may look at the whole model.
        """
        zeros = {f"{name}.weight": np.zeros_like(next(iter(cores.values()))) for name, cores in modules.items()}
        models = [dict(zeros) for _ in range(count)]
        for name, cores in modules.items():
            for place, small in cores.items():
                models[place][f"{name}.weight"] = small
        base = None if get(self.method).base == "ignored" else zeros
        self.merged = merge_tensors(
            self.method, models, base, parameters=self.parameters, per_model=self.per_model, seed=self.seed
        )

    def merge(self, module: str, terms: Sequence[Term], places: Sequence[int], dtype: str) -> Result:
        return _stored(outside(core_of(terms), self.merged[f"{module}.weight"], self.limits), dtype)


Rule = Exact | Compatible | InCore


def _stored(found: LowRank, dtype: str) -> Result:
    """The factors, rounded; the error is what was cut off and what rounding changed."""
    b, a = factors(found, True, dtype)
    cut = float(np.linalg.norm(found.spectrum[found.rank :]))
    return Result(b, a, found.norm, hypot(cut, rounding(found, b, a)))

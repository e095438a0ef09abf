"""What a group of tensors tells about the models' task vectors: sizes, zeros, quantiles, conflicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

# Magnitudes are counted in bins of 1/64 octave, from 2^-48 to 2^16; what lies outside counts at the edge.
_SHIFT, _FIRST, _BINS = 17, (127 - 48) << 6, 64 << 6

Floats = npt.NDArray[np.float64]


@dataclass
class TaskVectors:
    """Sums over elements, for k models against one base. Sums of two groups add up.

    ``elements`` and all sums are estimates for the whole group where only a part of it was ``read``.
    ``nonfinite`` (k): elements that are no numbers and count as unchanged; ``largest`` (k): max |delta|;
    ``magnitudes`` (k, bins): histogram of |delta|; ``products``, ``conflicts``, ``overlaps`` (k, k): dot
    products, elements that both change with opposite signs, elements that both change.
    """

    elements: float
    read: int
    base_square: float
    nonfinite: Floats
    largest: Floats
    magnitudes: Floats
    products: Floats
    conflicts: Floats
    overlaps: Floats

    @classmethod
    def none(cls, models: int) -> TaskVectors:
        square = (models, models)
        return cls(
            0.0, 0, 0.0, np.zeros(models), np.zeros(models), np.zeros((models, _BINS)),
            np.zeros(square), np.zeros(square), np.zeros(square),
        )  # fmt: skip

    def add(self, other: TaskVectors) -> None:
        self.elements += other.elements
        self.read += other.read
        self.base_square += other.base_square
        self.largest = np.maximum(self.largest, other.largest)
        for name in ("nonfinite", "magnitudes", "products", "conflicts", "overlaps"):
            getattr(self, name).__iadd__(getattr(other, name))

    def add_elements(self, rows: Sequence[npt.NDArray[Any]]) -> None:
        """Count one run: the base's elements, then each model's."""
        base, *models = rows
        with np.errstate(invalid="ignore", over="ignore"):
            deltas = np.stack([model - base for model in models])
        finite = np.isfinite(deltas)
        if not finite.all():
            self.nonfinite += (~finite).sum(axis=1)
            deltas[~finite], base = 0, np.nan_to_num(base, nan=0, posinf=0, neginf=0)
        self.elements += len(base)
        self.read += len(base)
        self.base_square += float(np.square(base, dtype=np.float64).sum())
        self.largest = np.maximum(self.largest, np.abs(deltas).max(axis=1, initial=0))
        wide = deltas.astype(np.float64)
        self.products += np.einsum("in,jn->ij", wide, wide)
        self._count_signs(deltas > 0, deltas < 0)
        for counts, delta in zip(self.magnitudes, deltas, strict=True):
            counts += _histogram(delta)

    def _count_signs(self, up: npt.NDArray[np.bool_], down: npt.NDArray[np.bool_]) -> None:
        changed = up | down
        for i, j in np.ndindex(self.overlaps.shape):
            self.overlaps[i, j] += np.count_nonzero(changed[i] & changed[j])
            self.conflicts[i, j] += np.count_nonzero(up[i] & down[j]) + np.count_nonzero(down[i] & up[j])

    def scale_to(self, elements: int) -> None:
        """Let the elements read stand for ``elements``."""
        factor = elements / self.elements if self.elements else 0.0
        self.elements = float(elements)
        self.base_square *= factor
        for name in ("magnitudes", "products", "conflicts", "overlaps"):
            getattr(self, name).__imul__(factor)

    # --- what it says -----------------------------------------------------------------------------------

    def norm(self, model: int) -> float:
        return sqrt(max(0.0, self.products[model, model]))

    def ratio(self, model: int) -> float:
        """norm(delta) / norm(base)."""
        return _share(self.norm(model), sqrt(self.base_square))

    def zeros(self, model: int) -> float:
        """Share of the elements that are exactly the base's."""
        return 1 - _share(float(self.overlaps[model, model]), self.elements)

    def quantile(self, model: int, share: float) -> float:
        """The |delta| below which ``share`` of the elements lie, to within 0.8 %."""
        wanted = share * self.elements * (1 - 1e-12)
        if wanted <= self.elements - self.overlaps[model, model]:
            return 0.0
        found = int(np.searchsorted(np.cumsum(self.magnitudes[model]), wanted))
        return min(_middle(found), float(self.largest[model]))

    def cosine(self, a: int, b: int) -> float:
        """Between the task vectors of two models; NaN when one is zero."""
        return _share(float(self.products[a, b]), self.norm(a) * self.norm(b))

    def conflict(self, a: int, b: int) -> float:
        """Of the elements that both models change, the share where they move apart."""
        return _share(float(self.conflicts[a, b]), float(self.overlaps[a, b]))


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")


def _histogram(delta: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Counts of the magnitudes by bin; zeros are in the first."""
    bits = delta.astype(np.float32, copy=False).view(np.uint32)
    bins = (bits & np.uint32(0x7FFFFFFF)) >> np.uint32(_SHIFT)
    counts = np.bincount(bins, minlength=1 << (31 - _SHIFT))
    inside = counts[_FIRST : _FIRST + _BINS].copy()
    inside[0] += counts[:_FIRST].sum()
    inside[-1] += counts[_FIRST + _BINS :].sum()
    return inside


def _middle(bin_index: int) -> float:
    """The geometric middle of a bin, near enough: half-way through its bits."""
    bits = ((_FIRST + bin_index) << _SHIFT) + (1 << (_SHIFT - 1))
    return float(np.uint32(bits).view(np.float32))

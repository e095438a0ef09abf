"""Exact order statistics by counting: the k-th smallest magnitude without sorting and without a copy.

The bits of |x|, read as an unsigned integer, are ordered like the magnitudes. A search keeps a window of
those integers that holds the wanted rank; each pass over the data counts what lies below the window and how
the inside spreads over bins, and narrows the window to one bin. A sample sets the first window, and so
decides the speed only: a wrong guess costs one more pass, never a wrong result. Counts are integers, so they
may be added in any order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

#: At most this many bins per histogram: 4 MB of counters, of which a good guess touches a few per cent.
MAX_BINS = 1 << 20


@dataclass
class RankSearch:
    """Narrow a window of magnitude bits until it is the single value of ``rank`` (1-based).

    ``bits`` is 31 for float32 values and 63 for float64.
    """

    rank: int
    bits: int = 31
    low: int = 0
    high: int = field(default=0)

    def __post_init__(self) -> None:
        self.high = self.high or 1 << self.bits

    def guess(self, sample: npt.NDArray[Any], population: int) -> None:
        """Start from the window that a sample of magnitude bits suggests, six standard errors wide."""
        size = len(sample)
        share = self.rank / population
        margin = 6 * sqrt(max(share * (1 - share), 1 / size) / size)
        ordered = np.sort(sample)
        first, last = int((share - margin) * size), int((share + margin) * size) + 1
        self.low = int(ordered[first]) if first > 0 else 0
        self.high = int(ordered[last]) + 1 if last < size else 1 << self.bits

    @property
    def width(self) -> int:
        """log2 of the number of magnitudes per bin."""
        return max(0, (self.high - self.low - 1).bit_length() - MAX_BINS.bit_length() + 1)

    @property
    def bins(self) -> int:
        return ((self.high - self.low - 1) >> self.width) + 1

    def absorb(self, below: int, counts: npt.NDArray[Any]) -> bool:
        """Take one pass's counts; True when the value is found, else the window has moved."""
        inside = int(counts.sum(dtype=np.int64))
        if self.rank <= below:
            self.low, self.high = 0, self.low
        elif self.rank > below + inside:
            self.low, self.high = self.high, 1 << self.bits
        else:
            return self._narrow(below, counts)
        return False

    def _narrow(self, below: int, counts: npt.NDArray[Any]) -> bool:
        cumulative = np.cumsum(counts, dtype=np.int64)
        bin_index = int(np.searchsorted(cumulative, self.rank - below))
        width = self.width
        self.low += bin_index << width
        self.high = min(self.high, self.low + (1 << width))
        return width == 0

    @property
    def value(self) -> float:
        """The magnitude found."""
        if self.bits == 63:
            return float(np.uint64(self.low).view(np.float64))
        return float(np.uint32(self.low).view(np.float32))


def bits_of(magnitude: float, bits: int) -> int:
    """The integer whose order is the magnitude's order."""
    if bits == 63:
        return int(np.float64(magnitude).view(np.uint64))
    return int(np.float32(magnitude).view(np.uint32))

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

_BLOCK = 4096


def _locate(counts: npt.NDArray[Any], rank: int) -> tuple[int, int]:
    """The index whose cumulative count reaches ``rank``, and the rank within it."""
    cumulative = np.cumsum(counts, dtype=np.int64)
    index = int(np.searchsorted(cumulative, rank))
    return index, rank - int(cumulative[index - 1] if index else 0)


@dataclass
class RankSearch:
    """Narrow a window of magnitude bits until it is the single value of ``rank`` (1-based).

    ``bits`` is 31 for float32 values and 63 for float64. In the end ``equal`` magnitudes are the value found,
    of which the one of ``rank`` is the ``place``-th (1-based).
    """

    rank: int
    bits: int = 31
    low: int = 0
    high: int = field(default=0)
    equal: int = 0
    place: int = 0

    def __post_init__(self) -> None:
        self.high = self.high or 1 << self.bits

    def guess(self, sample: npt.NDArray[Any], population: int) -> None:
        """Start from the window that a sample of magnitude bits suggests, three standard errors to each side."""
        size = len(sample)
        share = self.rank / population
        margin = 3 * sqrt(max(share * (1 - share), 1 / size) / size)
        first, last = int((share - margin) * size), int((share + margin) * size) + 1
        ordered = np.partition(sample, [max(0, first), min(size - 1, last)])
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
        blocks = np.add.reduceat(counts, np.arange(0, len(counts), _BLOCK), dtype=np.int64)
        inside = int(blocks.sum())
        if self.rank <= below:
            self.low, self.high = 0, self.low
        elif self.rank > below + inside:
            self.low, self.high = self.high, 1 << self.bits
        else:
            return self._narrow(self.rank - below, blocks, counts)
        return False

    def _narrow(self, rank: int, blocks: npt.NDArray[np.int64], counts: npt.NDArray[Any]) -> bool:
        """Move to the bin of ``rank`` within the window; ``blocks`` are sums of _BLOCK counts each."""
        block, rank = _locate(blocks, rank)
        inner, self.place = _locate(counts[block * _BLOCK : (block + 1) * _BLOCK], rank)
        width, bin_index = self.width, block * _BLOCK + inner
        self.equal = int(counts[bin_index])
        self.low += bin_index << width
        self.high = min(self.high, self.low + (1 << width))
        return width == 0

    def settle(self, everything: npt.NDArray[Any]) -> None:
        """Find the value among all magnitude bits at once."""
        self.low = int(np.partition(everything, self.rank - 1)[self.rank - 1])
        self.equal = int(np.count_nonzero(everything == self.low))
        self.place = self.rank - int(np.count_nonzero(everything < self.low))

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

"""An embedding or head read in the order of the output's vocabulary, row by row from where each comes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.dtypes import DTYPES, narrowed
from ..tokenizer import RowMap
from ..tokenizer.rows import AVERAGE, MEAN, ZERO
from .operands import CheckpointOperand
from .tiles import TILE

Values = npt.NDArray[Any]


#: Where fewer rows than this lie together on average, they are read one by one in a single call.
_LEAST_RUN = 8


class GatheredOperand:
    """The rows of ``lenders`` (tensors of equal row shape, by the indices of ``rows``) as one tensor.

    Consecutive rows are read at once; nothing is held but the mean row. ``dtype`` holds what all lenders hold.
    """

    def __init__(
        self, label: str, name: str, lenders: Mapping[int, CheckpointOperand], rows: RowMap, dtype: str,
        native: str = "",
    ) -> None:  # fmt: skip
        row = next(iter(lenders.values())).shape[1:]
        self.label, self.name, self.lenders, self.rows, self.dtype = label, name, lenders, rows, dtype
        self.native = native or dtype
        self.shape = (len(rows), *row)
        self.count = prod(self.shape)
        self._width = prod(row)
        self._mean: Values | None = None
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        return self.count * DTYPES[self.dtype].bits // 8

    def read(self, start: int, out: Values) -> None:
        """Fill ``out`` (storage type) with elements from ``start`` on."""
        width, end = self._width, start + len(out)
        first, last = start // width, -(-end // width)
        runs = list(self._runs(first, last))
        if _LEAST_RUN * len(runs) > last - first > 1:
            rows = self._scattered(first, last).reshape(-1)
            out[:] = rows[start - first * width :][: len(out)]
            return
        for run, after in runs:
            begin = max(run * width, start)
            self._fill(out[begin - start : min(after * width, end) - start], run, begin - run * width)

    def _scattered(self, first: int, last: int) -> Values:
        """Whole rows first .. last that lie all over their lenders, as stored."""
        lender, row = self.rows.lender[first:last], self.rows.row[first:last]
        out = np.zeros((last - first, self._width), DTYPES[self.dtype].storage)
        for index, operand in self.lenders.items():
            places = np.flatnonzero(lender == index)
            stored = np.empty((len(places), self._width), DTYPES[operand.dtype].storage)
            operand.checkpoint.read_runs(operand.name, row[places] * self._width, stored)
            out[places] = self._widened(stored, operand.dtype)
        for place in np.flatnonzero((lender == MEAN) | (lender == AVERAGE)):
            self._fill(out[place], first + int(place), 0)
        return out

    def _widened(self, stored: Values, code: str) -> Values:
        if code == self.dtype:
            return stored
        dtype = DTYPES[self.dtype]
        return dtype.as_storage(DTYPES[code].as_values(stored).astype(dtype.values))

    def fingerprint(self) -> None:
        """See to it that every lender has been read whole once, for the digests of the inputs."""
        for operand in self.lenders.values():
            operand.fingerprint()

    def _runs(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Rows first .. last as stretches that lie together in one lender."""
        lender, row = self.rows.lender[first:last], self.rows.row[first:last]
        joined = (lender[1:] == lender[:-1]) & (row[1:] == row[:-1] + 1) & (lender[1:] >= 0)
        cuts = [first, *(first + 1 + np.flatnonzero(~joined)).tolist(), last]
        return pairwise(cuts)

    def _fill(self, part: Values, row: int, offset: int) -> None:
        """Elements of one stretch, from element ``offset`` of its first row on."""
        lender = int(self.rows.lender[row])
        if lender >= 0:
            self._lend(lender, int(self.rows.row[row]), offset, part)
        elif lender == ZERO:
            part[:] = 0
        else:
            values = self._mean_row() if lender == MEAN else self._average(int(self.rows.row[row]))
            part[:] = self._stored(values)[offset : offset + len(part)]

    def _lend(self, lender: int, row: int, offset: int, part: Values) -> None:
        operand = self.lenders[lender]
        if operand.dtype == self.dtype:
            operand.read(row * self._width + offset, part)
            return
        narrow = np.empty(len(part), DTYPES[operand.dtype].storage)
        operand.read(row * self._width + offset, narrow)
        part[:] = self._widened(narrow, operand.dtype)

    def _stored(self, values: Values) -> Values:
        """float64 values, each rounded once."""
        dtype = DTYPES[self.dtype]
        once = narrowed(values) if dtype.bits == 16 else values
        return dtype.as_storage(once.astype(dtype.values))

    def _average(self, index: int) -> Values:
        """The mean of the rows that several models have for one token."""
        parts = self.rows.averages[index]
        total = np.zeros(self._width, np.float64)
        for lender, row in parts:
            operand = self.lenders[lender]
            stored = np.empty(self._width, DTYPES[operand.dtype].storage)
            operand.read(row * self._width, stored)
            total += DTYPES[operand.dtype].as_values(stored).astype(np.float64)
        return total / len(parts)

    def _mean_row(self) -> Values:
        """The mean of all other rows, summed in order, in fp64; made when it is first asked for."""
        with self._lock:
            if self._mean is None:
                self._mean = np.zeros(self._width, np.float64)  # what it counts for while it is made
                self._mean = self._summed() / max(1, int((self.rows.lender != MEAN).sum()))
            return self._mean

    def _summed(self) -> Values:
        total = np.zeros(self._width, np.float64)
        step = TILE // max(1, self._width) or 1
        for first in range(0, len(self.rows), step):
            stored = np.empty(min(step, len(self.rows) - first) * self._width, DTYPES[self.dtype].storage)
            self.read(first * self._width, stored)
            values = DTYPES[self.dtype].as_values(stored).reshape(-1, self._width)
            total += values.astype(np.float64).sum(axis=0)
        return total

"""Where each row of an aligned embedding comes from. Vectors over rows: a vocabulary may have a million.

Rules as in mergekit, in this order: a forced row; the model's own row of the token; the row that the recipe
names; the base's row; the only owner's row; the mean of all owners' rows; zero. Where none of the models that
are merged into the tensor has the token, the other models of the recipe are asked in the same way before zero.
Rows that no token has are the model's own, if no token has them there either, or else the base's; where there
is neither, and in rows made by ``pad_to_multiple_of``, it is the mean of all other rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

#: In place of a lender: a row of zeros, the mean of all other rows, the mean of several models' rows.
ZERO, MEAN, AVERAGE = -1, -2, -3
_LACKING = -4

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Holder:
    """One model's tensor, as far as its rows go.

    ``own``: for each row of the output the row that the model has for the same token, or -1. ``blank``: which of
    its rows no token has.
    """

    own: Index
    blank: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, ids: Mapping[str, int], rows: int, tokens: Sequence[str | None]) -> Holder:
        """A tensor of ``rows`` rows of a model with these ``ids``; ``tokens``: of the output, by row."""
        own = np.fromiter((-1 if token is None else ids.get(token, -1) for token in tokens), np.int64, len(tokens))
        blank = np.ones(rows, np.bool_)
        blank[[index for index in ids.values() if index < rows]] = False
        return cls(np.where(own < rows, own, -1), blank)


class RowRule(NamedTuple):
    """What the recipe says of one row: from ``lender`` (an index, or ZERO) its ``row``; ``force``: for all models."""

    lender: int
    row: int
    force: bool


@dataclass(frozen=True, eq=False)
class RowMap:
    """The rows of one model's tensor in the order of the output.

    ``lender``: for each row the index of the tensor that it is taken from, or ZERO, MEAN, AVERAGE. ``row``: which
    row there; for AVERAGE which of the ``averages``, each a tuple of (lender, row).
    """

    lender: Index
    row: Index
    averages: tuple[tuple[tuple[int, int], ...], ...] = ()

    def __len__(self) -> int:
        return len(self.lender)

    def lenders(self) -> set[int]:
        """The indices of all tensors that rows are taken from."""
        direct = {int(index) for index in np.unique(self.lender) if index >= 0}
        return direct | {lender for parts in self.averages for lender, _ in parts}

    def is_identity(self, own: int, rows: int) -> bool:
        """Whether this is tensor ``own`` of ``rows`` rows as it is."""
        same = len(self) == rows and bool((self.lender == own).all())
        return same and bool((self.row == np.arange(rows)).all())

    @classmethod
    def first(cls, own: int, rows: int) -> RowMap:
        """The first ``rows`` rows of tensor ``own``."""
        return cls(np.full(rows, own, np.int64), np.arange(rows, dtype=np.int64))


def tokens_by_id(ids: Mapping[str, int], rows: int) -> list[str | None]:
    """The token of each row, None where there is none."""
    tokens: list[str | None] = [None] * rows
    for token, index in ids.items():
        tokens[index] = token
    return tokens


def map_rows(
    own: int, holders: Sequence[Holder], groups: Sequence[Sequence[int]], base: int | None,
    named: npt.NDArray[np.bool_], rules: Mapping[int, RowRule], mean_blanks: bool,
) -> RowMap:  # fmt: skip
    """The rows of the tensor of ``holders[own]``.

    groups: indices of the tensors that may lend rows of tokens, those merged together first. base: which is the
    base's, if any. named: which rows of the output have a token. rules: by row. mean_blanks: rows without a
    token are always the mean.
    """
    builder = _Builder(own, holders, base, named)
    builder.apply(rules, forced=False)
    for group in groups:
        builder.lend(group)
    builder.blanks(mean_blanks)
    builder.apply(rules, forced=True)
    return builder.finished()


class _Builder:
    def __init__(self, own: int, holders: Sequence[Holder], base: int | None, named: npt.NDArray[np.bool_]) -> None:
        self._own, self._holders, self._base, self._named = own, holders, base, named
        self._row = holders[own].own.copy()
        self._lender = np.where(self._row >= 0, own, _LACKING)
        self._averages: list[tuple[tuple[int, int], ...]] = []

    def apply(self, rules: Mapping[int, RowRule], *, forced: bool) -> None:
        for index, rule in rules.items():
            if rule.force if forced else self._lender[index] == _LACKING:
                self._lender[index], self._row[index] = rule.lender, rule.row

    def lend(self, group: Sequence[int]) -> None:
        """Rows that are still lacking: the base's, the only owner's, the mean of the owners'."""
        if self._base is not None and self._base in group:
            self._take(self._lacking() & (self._holders[self._base].own >= 0), self._base)
        owners = np.sum([self._holders[index].own >= 0 for index in group], axis=0)
        for index in group:
            self._take(self._lacking() & (owners == 1) & (self._holders[index].own >= 0), index)
        for place in np.flatnonzero(self._lacking() & (owners > 1)):
            parts = [(index, int(self._holders[index].own[place])) for index in group]
            self._lender[place], self._row[place] = AVERAGE, len(self._averages)
            self._averages.append(tuple(part for part in parts if part[1] >= 0))

    def blanks(self, always_mean: bool) -> None:
        """Rows without a token."""
        self._lender[~self._named] = MEAN
        for index in () if always_mean else (self._base, self._own):
            if index is not None:
                blank = self._holders[index].blank[: len(self._named)]
                places = np.flatnonzero(blank & ~self._named[: len(blank)])
                self._lender[places], self._row[places] = index, places

    def finished(self) -> RowMap:
        self._lender[self._lacking()] = ZERO
        return RowMap(self._lender, self._row, tuple(self._averages))

    def _lacking(self) -> npt.NDArray[np.bool_]:
        return np.asarray((self._lender == _LACKING) & self._named)

    def _take(self, places: npt.NDArray[np.bool_], index: int) -> None:
        self._lender[places] = index
        self._row[places] = self._holders[index].own[places]

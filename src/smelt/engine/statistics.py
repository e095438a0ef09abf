"""Statistics checkpoints: numbers measured on data, found by the names of a model's tensors.

A tensor's statistic of a kind is stored as ``kind/name``, as ``name.kind``, or as ``name`` alone where the
file's metadata names no other ``kind``. A kind that may be factored is also read from the sums of its rows
and columns, ``kind_row/name`` and ``kind_col/name``.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..checkpoint import Checkpoint
from ..errors import OperationFailed, show
from ..kernels.broadcast import LowRank, rank_one, vector
from ..kernels.dtypes import DTYPES
from ..kernels.program import Operand
from ..methods import Method, Statistic
from .operands import CheckpointOperand, Ledger

Shape = tuple[int, ...]


class StatisticOperand(CheckpointOperand):
    """A stored statistic. What cannot have been measured (NaN, Inf, less than 0 unless ``signed``) is an error."""

    def __init__(self, checkpoint: Checkpoint, name: str, ledger: Ledger | None, signed: bool) -> None:
        super().__init__(checkpoint, name, ledger)
        self._signed = signed

    @property
    def nbytes(self) -> int:
        return self.checkpoint.tensors[self.name].nbytes

    def read(self, start: int, out: npt.NDArray[Any]) -> None:
        super().read(start, out)
        bad = _impossible(out, self.dtype, self._signed)
        if bad.any():
            what = "NaN or Inf" if self._signed else "negative, NaN or Inf"
            first = start + int(bad.argmax())
            raise OperationFailed(
                f"{self.label}: tensor {show(self.name)} holds {int(bad.sum())} values that are {what}, the first "
                f"at element {first}: collect it again"
            )


def _impossible(stored: npt.NDArray[Any], code: str, signed: bool) -> npt.NDArray[np.bool_]:
    """From the bits: above the largest finite number lie Inf and NaN and, with the sign, all that is negative."""
    bits = stored.view(f"u{stored.dtype.itemsize}")
    exponent, sign = (bits.dtype.type(x) for x in (DTYPES[code].exponent_mask, 1 << (DTYPES[code].bits - 1)))
    if signed:
        return np.asarray((bits & exponent) == exponent)
    if not bits.size or bits.max() < exponent:  # one fast look is nearly always enough
        return np.zeros(0, np.bool_)
    return np.asarray((bits >= exponent) & (bits != sign))


class FactoredOperand:
    """The matrix of rank one that its stored sums of rows and columns stand for; read when first used."""

    dtype = "F32"

    def __init__(self, rows: StatisticOperand, columns: StatisticOperand) -> None:
        self.label, self.name = rows.label, rows.name
        self.shape = (rows.count, columns.count)
        self.count = rows.count * columns.count
        self.nbytes = rows.nbytes + columns.nbytes
        self.parts = rows, columns
        self._matrix: LowRank | None = None
        self._lock = threading.Lock()

    def read(self, start: int, out: npt.NDArray[Any]) -> None:
        with self._lock:
            if self._matrix is None:
                self._matrix = rank_one(*(vector(part).reshape(-1) for part in self.parts))
        self._matrix.read(start, out)


Found = StatisticOperand | FactoredOperand


class Statistics:
    """One statistics checkpoint."""

    def __init__(self, checkpoint: Checkpoint, ledger: Ledger | None = None) -> None:
        self.checkpoint = checkpoint
        self.label = checkpoint.label
        self._ledger = ledger
        self._found: dict[tuple[str, str], Found | None] = {}

    def find(self, statistic: Statistic, name: str) -> Found | None:
        """The statistic of the tensor ``name``: one operand however often it is asked for, to share its reads."""
        key = statistic.kind, name
        if key not in self._found:
            self._found[key] = next(self._candidates(statistic, name), None)
        return self._found[key]

    def _candidates(self, statistic: Statistic, name: str) -> Iterator[Found]:
        for kind in (statistic.kind, *statistic.also):
            dense = self._stored(kind, name, statistic.signed)
            if dense is not None:
                yield dense
            rows, columns = (self._stored(f"{kind}_{part}", name) for part in ("row", "col"))
            if statistic.factored and rows is not None and columns is not None:
                yield FactoredOperand(rows, columns)

    def _stored(self, kind: str, name: str, signed: bool = False) -> StatisticOperand | None:
        metadata = self.checkpoint.metadata.get("kind")
        bare = [name] if metadata == kind or (metadata is None and not kind.endswith(("_row", "_col"))) else []
        for spelling in (f"{kind}/{name}", f"{name}.{kind}", *bare):
            if spelling in self.checkpoint:
                return StatisticOperand(self.checkpoint, spelling, self._ledger, signed)
        return None


class Member(NamedTuple):
    """One model of a merge: what to call it, what it calls the tensor, and the statistics given beside it.

    ``aligned``: the tensor's rows are in the order of another vocabulary, the statistic's are not.
    """

    model: str
    tensor: str
    statistics: Statistics | None
    aligned: bool = False


class Finder:
    """Gives each tensor the statistics that its method uses, and remembers what is missing or does not fit."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._absent: dict[str, None] = {}
        self._misfits: list[str] = []
        self._missing: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._wanted: set[str] = set()
        self._seen: set[str] = set()
        self._given: dict[str, None] = {}
        self._used: set[str] = set()

    def of(
        self, name: str, shape: Shape, shared: Mapping[str, Any], merged: Sequence[Member], base: Member | None = None
    ) -> dict[str, tuple[Operand, ...]]:
        """kind -> one operand per merged model (one in all for a ``single`` kind), where all are there."""
        everyone = [*merged, *([base] if base is not None else [])]
        self._given.update(dict.fromkeys(member.statistics.label for member in everyone if member.statistics))
        chosen: dict[str, tuple[Operand, ...]] = {}
        for statistic in (s for s in self._method.statistics if s.used(shared)):
            self._wanted.add(statistic.kind)
            holders = self._holders(statistic, everyone if statistic.single else merged)
            found = [member.statistics.find(statistic, member.tensor) for member in holders if member.statistics]
            lenient = shared.get("missing", "error") != "error" or (statistic.partial and not any(found))
            complete = self._complete(statistic, name, shape, holders, found, lenient)
            if complete:
                chosen[statistic.kind] = complete
                self._seen.add(statistic.kind)
        return chosen

    def _holders(self, statistic: Statistic, members: Sequence[Member]) -> Sequence[Member]:
        """The models whose statistics are used; remembers those that have none."""
        with_some = [member for member in members if member.statistics is not None]
        self._used.update(member.statistics.label for member in with_some if member.statistics)
        if statistic.single:
            if len(with_some) != 1:
                self._absent[f"{self._who(statistic)} beside one model, {len(with_some)} have some"] = None
            return with_some[:1]
        for member in (member for member in members if member.statistics is None):
            self._absent[f"{self._who(statistic)} beside each model, {member.model} has none"] = None
        return with_some if len(with_some) == len(members) else ()

    def _who(self, statistic: Statistic) -> str:
        return f"{self._method.name} needs statistics of kind {statistic.kind}"

    def _complete(
        self, statistic: Statistic, name: str, shape: Shape, holders: Sequence[Member], found: Sequence[Found | None],
        lenient: bool,
    ) -> tuple[Operand, ...]:  # fmt: skip
        """All operands where each is there and fits, else nothing."""
        complete = []
        for member, operand in zip(holders, found, strict=True):
            assert member.statistics is not None
            if operand is None and not lenient:
                self._missing[member.statistics.label, statistic.kind].append(member.tensor)
            elif operand is not None and member.aligned and statistic.shape == "tensor":
                self._misfits.append(
                    f"{operand.label}: the rows of {show(operand.name)} are those of {member.model}'s own tokens, and "
                    "statistics are not aligned by token: merge models with one vocabulary, or leave the tensor out"
                )
            elif operand is not None and _fits(operand, statistic, shape):
                complete.append(operand)
            elif operand is not None:
                self._misfits.append(_misfit(operand, statistic, name, shape))
        return tuple(complete) if len(complete) == len(holders) else ()

    def usage_problems(self) -> list[str]:
        """Models without the statistics that the method needs, and statistics that it does not look at."""
        idle = [label for label in self._given if label not in self._used]
        return [*self._absent, *(f"{label}: has no effect with {self._method.name} as it is set" for label in idle)]

    def problems(self) -> list[str]:
        """Tensors whose statistic is missing or of another shape."""
        kinds = self._wanted - self._seen if not self._missing and not self._misfits and not self._absent else set()
        nowhere = [f"{', '.join(self._given)}: no tensor has a statistic of kind {kind}" for kind in sorted(kinds)]
        lenient = [name for name in ("missing", "exclude") if self._method.parameter(name)]
        hint = f"; see the parameter {' and '.join(lenient)}" if lenient else ""
        missing = [_missing(label, kind, names) + hint for (label, kind), names in sorted(self._missing.items())]
        return [*missing, *self._misfits, *nowhere]


def _missing(label: str, kind: str, names: Sequence[str]) -> str:
    named = ", ".join(show(name) for name in names[:3]) + (" and others" if len(names) > 3 else "")
    return f"{label}: no {kind} of {len(names)} tensor(s): {named}"


def _fits(operand: Found, statistic: Statistic, shape: Shape) -> bool:
    wanted = _wanted_shape(statistic, shape)
    arithmetic = DTYPES[operand.dtype].arithmetic
    return arithmetic and (operand.count == 1 if statistic.shape == "number" else operand.shape == wanted)


def _wanted_shape(statistic: Statistic, shape: Shape) -> Shape | None:
    """None where no statistic of this kind can belong to a tensor of this shape."""
    if statistic.shape == "tensor":
        return shape
    if len(shape) not in ((1, 2) if statistic.shape == "columns" else (2,)):
        return None
    return (shape[-1],) if statistic.shape == "columns" else (shape[-1], shape[-1])


def _misfit(operand: Found, statistic: Statistic, name: str, shape: Shape) -> str:
    if not DTYPES[operand.dtype].arithmetic:
        return f"{operand.label}: tensor {show(operand.name)} is {operand.dtype}, expected floating numbers"
    wanted = () if statistic.shape == "number" else _wanted_shape(statistic, shape)
    expected = f"expected {list(wanted)}" if wanted is not None else f"which a {statistic.kind} cannot describe"
    return (
        f"{operand.label}: tensor {show(operand.name)} is {list(operand.shape)} for {show(name)} {list(shape)}, "
        f"{expected}"
    )


def stored_bytes(operands: Iterable[Operand]) -> int:
    """Bytes that statistics take in their files."""
    return sum(operand.nbytes for operand in operands if isinstance(operand, StatisticOperand | FactoredOperand))

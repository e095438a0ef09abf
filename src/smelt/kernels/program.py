"""What a method asks for: a formula on operands, and the statistics it needs first.

A method is a coroutine over one tensor. It yields requests (:class:`Rank`, :class:`Top`, :class:`Totals`,
:class:`Gram`, :class:`Rows`), receives their results, and returns the :class:`Call` that makes the output, or a
:class:`Whole` where the output needs whole matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Protocol

import numpy.typing as npt

from .random import threshold_of
from .source import Formula, Then, names_of

#: Elements per partial sum: sums run over blocks of so many elements, then exactly over the blocks.
SUM_BLOCK = 4096


class Operand(Protocol):
    """One tensor of one checkpoint, read in runs of elements."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def count(self) -> int: ...
    def read(self, start: int, out: npt.NDArray[Any]) -> None: ...


@dataclass(frozen=True)
class Draw:
    """Keep each element independently with probability ``density``; the stream is named by ``key``.

    The density is one number in (0, 1], or an operand that holds each element's own, in [0, 1].
    """

    key: tuple[int, int]
    density: Any  # float | Operand

    @property
    def threshold(self) -> int | None:
        """The least word that is kept; None where each element has its own."""
        return threshold_of(self.density) if isinstance(self.density, int | float) else None


@dataclass(frozen=True, eq=False)
class Mask:
    """A draw handed in: an operand of dtype U8 or BOOL, non-zero where the element is kept."""

    operand: Any  # Operand | ByRow


@dataclass(frozen=True, eq=False)
class Change:
    """How ``operand`` differs from the base: it reaches functions of whole tensors as factors of ``rank`` at most."""

    operand: Any  # Operand, of which ``factors()`` is read
    rank: int

    @property
    def nbytes(self) -> int:
        """Bytes of the factors, as they are read."""
        shape: tuple[int, ...] = self.operand.shape
        return 4 * self.rank * ((shape[0] if shape else 1) + prod(shape[1:]))


@dataclass(frozen=True, eq=False)
class ByRow:
    """An operand (F32, or F64) that is computed from whole rows of others: for outputs and Totals, not beside a Quota.

    ``function(**arguments)`` sees a few whole rows at a time, as that of :class:`Rows` does, and returns as many
    numbers. ``shape`` is the tensor's, or another of as many elements: its last axis is the row.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: str = "F32"

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def row(self) -> int:
        """Elements per row."""
        return row_length(self.shape)

    @property
    def call(self) -> Call:
        return Call(self.function, self.arguments)


def row_length(shape: tuple[int, ...]) -> int:
    """Elements per row: the last axis is the row, a scalar is a row of one."""
    return shape[-1] if shape else 1


@dataclass(frozen=True)
class Step:
    """A value that changes once along the tensor: ``before`` up to element ``cut``, ``after`` from there."""

    before: float
    after: float
    cut: int


@dataclass(frozen=True, eq=False)
class Quota:
    """A threshold that lets only some of the elements with |call| equal to ``magnitude`` pass.

    To be compared with >=: it is ``magnitude`` up to the ``first``-th of these, the next larger number from
    there on; the other way round where the ``first`` ones are to be stopped.
    """

    call: Call
    magnitude: float
    first: int
    stopped: bool = False


class Each(tuple[Operand, ...]):
    """Operands that a formula of Totals or Gram sees one after the other: it gives one number for each of them."""

    __slots__ = ()


Argument = Any  # Operand | ByRow | Change | Draw | Mask | float | Step | Quota, or a tuple of these


@dataclass(frozen=True, eq=False)
class Call:
    """``formula`` applied to every element of one tensor.

    An Operand argument reaches the formula as one number, a Draw or Mask as a truth value, a float, Step or
    Quota as a constant of the computing precision, a bool as itself; tuples of these as tuples.
    """

    formula: Formula
    arguments: Mapping[str, Argument]
    kernels: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False)  # found once per call

    def items(self) -> Iterator[Any]:
        """All arguments, tuples unpacked, in order."""
        for value in self.arguments.values():
            yield from value if isinstance(value, tuple) else (value,)

    def operands(self) -> list[Operand]:
        """The distinct operands, in order of first use."""
        found: dict[int, Operand] = {}
        for item in self.items():
            operand = item.density if isinstance(item, Draw) else item
            operand = operand.operand if isinstance(operand, Mask | Change) else operand
            if not isinstance(operand, int | float | Step | Quota):
                found.setdefault(id(operand), operand)
        return list(found.values())

    @property
    def changes(self) -> list[Change]:
        return [item for item in self.items() if isinstance(item, Change)]

    @property
    def row(self) -> int | None:
        """Elements per row where some operand is made of whole rows."""
        return next((operand.row for operand in self.operands() if isinstance(operand, ByRow)), None)

    @property
    def count(self) -> int:
        return self.operands()[0].count


def call(formula: Formula, **arguments: Argument) -> Call:
    """Shorthand: ``call(ties, base=..., models=(...), weights=(0.5, 0.5))``."""
    return Call(formula, arguments)


@dataclass(frozen=True, eq=False)
class Rank:
    """The ``rank``-th smallest |value| (1-based) over all ``calls`` together, exactly. Result: float."""

    calls: tuple[Call, ...]
    rank: int


@dataclass(frozen=True, eq=False)
class Top:
    """The threshold at and above which exactly the ``keep`` largest |value| of ``call`` lie, 1 <= keep <= count.

    Of equal magnitudes the lowest indices are kept, or with ``last`` the highest, as an ascending stable sort has
    it. Result: the float, or a Quota where only some of the equal ones are wanted: an argument of this tensor's
    formulas.
    """

    call: Call
    keep: int
    last: bool = False

    @property
    def calls(self) -> tuple[Call, ...]:
        return (self.call,)


@dataclass(frozen=True, eq=False)
class Totals:
    """The sum of each number that the formula returns, in fp64, over all ``calls``. Result: list[float].

    The formula returns a tuple of numbers, or one number where an argument is an :class:`Each`.
    """

    calls: tuple[Call, ...]


@dataclass(frozen=True, eq=False)
class Gram:
    """All pairwise products of the numbers that the formula returns, as for Totals, summed in fp64.

    Result: a symmetric list of rows.
    """

    calls: tuple[Call, ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """Numbers for each row of one tensor (the last axis is the row; a vector is one row).

    ``function(**arguments)`` sees a few whole rows at a time, each Operand as an array (rows, row length) of
    the computing precision, and returns an array that begins with the same number of rows; it must treat
    every row alone. Result: the parts joined along the first axis, or with ``total`` added up in order. With
    ``whole`` the tensor is one row, and the result is what the function returns; a :class:`Change` may be asked for.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    total: bool = False
    whole: bool = False

    @property
    def calls(self) -> tuple[Call, ...]:
        return (Call(self.function, self.arguments),)


Request = Rank | Top | Totals | Gram | Rows


@dataclass(frozen=True, eq=False)
class Copy:
    """The output is this operand: its bytes where the dtype stays, else each value rounded once."""

    operand: Operand


class Source(Protocol):
    """An operand as a matrix (first axis, the rest) that is not held: its rows are read as often as they are wanted."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def rows(self, first: int, last: int) -> npt.NDArray[Any]:
        """Rows first .. last in the computing precision, as an array of one's own."""


@dataclass(frozen=True, eq=False)
class Whole:
    """A matrix function: whole operands in, the whole output tensor out.

    ``function(**arguments)`` receives each Operand as a numpy array of the computing precision (float32, or
    float64 where an input is), Masks and Draws as boolean arrays. With ``by_rows`` it is called for a few
    whole rows at a time, as (rows, row length), in bounded memory; it must treat every row alone. With ``strips``
    it receives each Operand as a :class:`Source` and yields the result's rows in order, some at a time. A
    :class:`Change` is its factors. ``shape``: of what it returns, where that is not the tensor's.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    by_rows: bool = False
    strips: bool = False
    shape: tuple[int, ...] | None = None

    @property
    def call(self) -> Call:
        return Call(self.function, self.arguments)


@dataclass(frozen=True, eq=False)
class Bits:
    """One bit per element, set where the value is not 0: eight to a byte, the first in the most significant bit."""

    call: Call


@dataclass(frozen=True)
class Number:
    """A single number, stored as float32."""

    value: float


Output = Call | Copy | Whole | Bits | Number


def then(outer: Formula, output: Output, **arguments: Argument) -> Output:
    """What ``outer`` makes of the values of ``output`` (its first argument) and ``arguments``, as one output."""
    if isinstance(output, Copy):
        return Call(outer, {names_of(outer)[0]: output.operand, **arguments})
    if isinstance(output, Call):
        return Call(Then(output.formula, outer), {**output.arguments, **arguments})
    assert isinstance(output, Whole), "a part of a result is final"
    after = _ThenStrips if output.strips else Then
    return replace(output, function=after(output.function, outer), arguments={**output.arguments, **arguments})


@dataclass(frozen=True)
class _ThenStrips:
    """``outer`` of each strip that ``inner`` yields, and of the same rows of its own operands."""

    inner: Callable[..., Iterator[npt.NDArray[Any]]]
    outer: Formula

    def __call__(self, **arguments: Any) -> Iterator[npt.NDArray[Any]]:
        own = {name: arguments.pop(name) for name in names_of(self.outer)[1:]}
        first = 0
        for strip in self.inner(**arguments):
            last = first + len(strip)
            yield self.outer(strip, **{name: _rows(value, first, last) for name, value in own.items()})
            first = last


def _rows(value: Any, first: int, last: int) -> Any:
    return value.rows(first, last) if hasattr(value, "rows") else value

"""Generate the source of a fused loop: load, compute the formula, round, store.

One template per kind of pass, one generated module per (template, formula, operand dtypes). The text is
self-contained but for the scalar building blocks, so it names the machine code that it leads to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .dtypes import DTYPES
from .program import SUM_BLOCK, Call, Draw, Each, Mask, Quota, Step
from .source import Formula, source_of

Kinds = tuple[tuple[str, Any], ...]

_BLOCK = 1024  # elements per block of random words (``random.BLOCK``)


@dataclass(frozen=True)
class Generated:
    """Source of a function ``run`` and the types of its parameters.

    A type is "int64", "float32", "uint32[3]" (a tuple) or "[uint16]" (a one-dimensional array). ``scratch``
    are arrays (name, dtype, length) that whoever calls has to lend; ``result`` takes two int64.
    """

    text: str
    parameters: tuple[tuple[str, str], ...]
    scratch: tuple[tuple[str, str, int], ...]


def precision_of(call: Call) -> str:
    """float64 when an operand is, else float32."""
    return "float64" if any(operand.dtype == "F64" for operand in call.operands()) else "float32"


def magnitude_of(precision: str) -> str:
    """The unsigned integer type that holds the bits of a magnitude."""
    return "uint64" if precision == "float64" else "uint32"


def kinds_of(call: Call) -> Kinds:
    """What each argument is, as far as generated code depends on it."""
    return tuple((name, _kind(value)) for name, value in call.arguments.items())


def _kind(value: Any) -> Any:
    if isinstance(value, tuple):
        return (*(("each",) if isinstance(value, Each) else ()), *(_kind(item) for item in value))
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int | float | Step | Quota):
        return "value"
    if isinstance(value, Draw):
        return "draw" if value.threshold is not None else f"draw {value.density.dtype}"
    return f"mask {value.operand.dtype}" if isinstance(value, Mask) else value.dtype


class _Arguments:
    """The generated code of a formula's arguments: parameters, loads, checks, and the formula's call."""

    def __init__(self, kinds: Kinds, precision: str) -> None:
        self.precision = precision
        self.parameters: list[tuple[str, str]] = []
        self.arrays: list[str] = []
        self.draws: list[int] = []
        self.loads: list[str] = []
        self.checks: list[str] = []
        self.call = _call({name: self._expression(kind) for name, kind in kinds})

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.parameters]

    @property
    def words(self) -> list[tuple[str, str, int]]:
        return [(f"words{n}", "uint32", _BLOCK) for n in self.draws]

    def _expression(self, kind: Any) -> str | list[str]:
        if isinstance(kind, tuple) and kind[:1] == ("each",):
            return [self._scalar(item) for item in kind[1:]]
        if isinstance(kind, tuple) and set(kind) == {"value"}:
            return self._parameter("v", f"{self.precision}[{len(kind)}]")
        if isinstance(kind, tuple):
            return "(" + "".join(self._scalar(item) + ", " for item in kind) + ")"
        return self._scalar(kind)

    def _scalar(self, kind: str) -> str:
        n = len(self.parameters)
        if kind in ("True", "False"):
            return kind
        if kind == "value":
            return self._parameter("v", self.precision)
        if kind.startswith("draw"):
            self.draws.append(n)
            key = self._parameter("k", "uint32[3]")
            own = kind.removeprefix("draw").strip()
            return f"drawn(w{n}[i], {self._scalar(own)})" if own else f"(w{n}[i] >= {key}[2])"
        stored = DTYPES[kind.removeprefix("mask ")].storage.__name__
        self.arrays.append(self._parameter("a", f"[{stored}]"))
        if kind.startswith("mask "):
            return f"(a{n}[i] != 0)"
        self.loads.append(f"x{n} = {self.precision}(load_{kind}(a{n}[i]))")
        self.checks.append(f"nonfinite_{kind}(a{n}[i])")
        return f"x{n}"

    def _parameter(self, letter: str, kind: str) -> str:
        self.parameters.append((f"{letter}{len(self.parameters)}", kind))
        return self.names[-1]


def _call(arguments: dict[str, str | list[str]]) -> str:
    """The formula's call; where one argument is a list, a tuple of calls, one for each of its items."""
    for name, value in arguments.items():
        if isinstance(value, list):
            return "(" + "".join(f"{_call({**arguments, name: item})}, " for item in value) + ")"
    return "formula(" + ", ".join(f"{name}={value}" for name, value in arguments.items()) + ")"


def _loop(
    arguments: _Arguments, body: list[str], out: tuple[str, ...] = (), after: list[str] | None = None
) -> list[str]:
    """The loop over ``count`` elements; with draws or ``after``, over blocks of 1024.

    Counting from 0 over whole arrays lets LLVM see that no index is negative; that is what vectorises. So a
    block works on slices: its random words are drawn first, the elements computed, then ``after`` runs.
    ``out`` names the arrays that are written.
    """
    element = [*arguments.loads, *body]
    if not arguments.draws and not after:
        return ["for i in range(count):", *_deeper(element)]
    arrays = [*arguments.arrays, *out]
    blocks = [f"philox_block(k{n}[0], k{n}[1], block, words{n})" for n in arguments.draws]
    blocks += ["shift = (block << 10) - start", "low, high = max(shift, 0), min(shift + 1024, total)"]
    blocks += [f"w{n} = words{n}[low - shift : high - shift]" for n in arguments.draws]
    blocks += [f"{name} = all_{name}[low:high]" for name in arrays]
    blocks += ["count = high - low", "for i in range(count):", *_deeper(element), *(after or [])]
    return [
        *(f"all_{name} = {name}" for name in arrays),
        "total = count",
        "for block in range(start >> 10, (start + total + 1023) >> 10):",
        *_deeper(blocks),
    ]


def _deeper(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]


def _function(name: str, parameters: list[str], lines: list[str]) -> str:
    return "\n".join(["@njit(**FAST)", f"def {name}({', '.join(parameters)}):", *_deeper(lines)])


@dataclass(frozen=True)
class _Body:
    """One template filled in: parameters before the formula's, scratch arrays, lines, helper functions."""

    leading: list[tuple[str, str]]
    lines: list[str]
    scratch: list[tuple[str, str, int]]
    helpers: str = ""


def _map(arguments: _Arguments, out: str) -> _Body:
    """Write the formula's value; report non-finite inputs (1) and outputs (2)."""
    value = f"{arguments.precision}({arguments.call})"
    once = f"narrow_{arguments.precision}({value})" if DTYPES[out].bits == 16 else value
    body = [f"y = store_{out}({once})", "out[i] = y"]
    body += [f"bad_in |= {check}" for check in arguments.checks] + [f"bad_out |= nonfinite_{out}(y)"]
    lines = ["count, bad_in, bad_out = out.shape[0], False, False", *_loop(arguments, body, ("out",))]
    lines += ["result[0] = (1 if bad_in else 0) + (2 if bad_out else 0)"]
    return _Body([("start", "int64"), ("out", f"[{DTYPES[out].storage.__name__}]")], lines, arguments.words)


def _magnitude(arguments: _Arguments) -> str:
    return f"magnitude_{arguments.precision}({arguments.precision}({arguments.call}))"


def _count(arguments: _Arguments, out: str) -> _Body:
    """Histogram of |value| as bits: what lies below ``bottom``, and bins of 2^width bits from there.

    A block's magnitudes are computed first, in vectors; only filling the histogram goes one by one, and its
    branch is rarely taken: below ``bottom`` the difference wraps round to a huge number.
    """
    kind = magnitude_of(arguments.precision)
    body = [f"u = {_magnitude(arguments)}", "below += u < bottom", "above[i] = u - bottom"]
    fill = ["for i in range(count):", "    if above[i] < span:", "        histogram[above[i] >> width] += 1"]
    lines = [f"below, span = 0, {kind}(histogram.shape[0] << width)"]
    lines += [*_loop(arguments, body, after=fill), "result[0] = below"]
    leading = [("start", "int64"), ("count", "int64"), ("bottom", kind), ("width", kind), ("histogram", "[uint32]")]
    return _Body(leading, lines, [*arguments.words, ("above", kind, _BLOCK)])


def _sample(arguments: _Arguments, out: str) -> _Body:
    """|value| as bits, element by element."""
    lines = ["count = out.shape[0]", *_loop(arguments, [f"out[i] = {_magnitude(arguments)}"], ("out",))]
    leading = [("start", "int64"), ("out", f"[{magnitude_of(arguments.precision)}]")]
    return _Body(leading, lines, arguments.words)


def _equal(arguments: _Arguments, out: str) -> _Body:
    """How many |value| have exactly the bits ``wanted``, in each block of 1024 (the first may be cut short)."""
    after = ["found[block - first] = equal - before", "before = equal"]
    lines = ["first, equal, before = start >> 10, 0, 0"]
    lines += _loop(arguments, [f"equal += {_magnitude(arguments)} == wanted"], after=after)
    leading = [("start", "int64"), ("count", "int64"), ("wanted", magnitude_of(arguments.precision))]
    return _Body([*leading, ("found", "[int64]")], lines, arguments.words)


def _sums(arguments: _Arguments, out: str) -> _Body:
    """Sums of the numbers that the formula returns, or (``products``) of their pairs, per block of 4096.

    ``fill`` writes each number into a row of its own; the rows of a block stay in the fastest cache.
    """
    width = int(out)
    rows = [f"r{k}" for k in range(width)]
    words = [name for name, _, _ in arguments.words]
    body = [f"y = {arguments.call}", *(f"r{k}[i] = y[{k}]" for k in range(width))]
    parameters = ["start", "count", *rows, *words, *arguments.names]
    fill = _function("fill", parameters, _loop(arguments, body, tuple(rows)))
    sliced = [f"{name}[begin : begin + size]" if name in arguments.arrays else name for name in arguments.names]
    passed = ", ".join([*(f"{row}[:size]" for row in rows), *words, *sliced])
    pairs = [(a, b) for a in range(width) for b in range(a, width)]
    lines = [
        f"for part in range((count + {SUM_BLOCK - 1}) // {SUM_BLOCK}):",
        f"    begin = part * {SUM_BLOCK}",
        f"    size = min({SUM_BLOCK}, count - begin)",
        f"    fill(start + begin, size, {passed})",
        *(f"    {row}[size:] = 0" for row in rows),
        "    if products != 0:",
        *(f"        partials[part * {len(pairs)} + {n}] = dot(r{a}, r{b}, tree)" for n, (a, b) in enumerate(pairs)),
        "    else:",
        *(f"        partials[part * {width} + {k}] = total(r{k}, tree)" for k in range(width)),
    ]
    leading = [("start", "int64"), ("count", "int64"), ("products", "int64"), ("partials", "[float64]")]
    scratch = [*arguments.words, *((row, arguments.precision, SUM_BLOCK) for row in rows)]
    return _Body(leading, lines, [*scratch, ("tree", "float64", SUM_BLOCK // 4)], fill)


TEMPLATES: dict[str, Callable[[_Arguments, str], _Body]] = {
    "map": _map,
    "count": _count,
    "sample": _sample,
    "equal": _equal,
    "sums": _sums,
}

_HEAD = """import numpy as np
from numba import njit
from numpy import float32, float64, uint32, uint64
from smelt.kernels.scalars import *
from smelt.kernels.scalars import FAST
from smelt.kernels.sums import dot, total"""


def generate(template: str, formula: Formula, kinds: Kinds, precision: str, out: str) -> Generated:
    """The module for ``formula`` on arguments of these kinds; ``out`` is the stored dtype, or a width."""
    source = source_of(formula)
    arguments = _Arguments(kinds, precision)
    body = TEMPLATES[template](arguments, out)
    parameters = [*body.leading, *arguments.parameters]
    names = [name for name, _ in parameters] + [name for name, _, _ in body.scratch] + ["result"]
    constants = "\n".join(f"{name} = np.{precision}({value!r})" for name, value in sorted(source.constants.items()))
    functions = ("\n" + source.text).replace("\ndef ", "\n@njit(**FAST)\ndef ")
    run = _function("run", names, body.lines)
    parts = [_HEAD, constants, functions, f"formula = {source.name}", body.helpers, run]
    return Generated("\n\n".join(part for part in parts if part) + "\n", tuple(parameters), tuple(body.scratch))

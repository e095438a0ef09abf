"""Compile a formula into one fused loop: load, compute, round, store.

For each (template, formula, operand dtypes) a small module is generated, written once to the cache folder
and imported; Numba's own disk cache then spares the next process the compilation. The module's name is a
hash of everything that decides its machine code: the formula's text and that of all it calls, the
template, the scalar building blocks and the versions. A kernel that closed over a formula would never hit
the cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from .. import storage
from ..errors import OperationFailed, show
from .program import SUM_BLOCK as BLOCK
from .program import Call, Draw, Mask, Step
from .source import Formula, source_of

Kernel = Callable[..., Any]
Kinds = tuple[tuple[str, Any], ...]


def kernel_for(template: str, call: Call, out: str = "") -> Kernel:
    """The compiled kernel for ``call``; ``template`` is a key of TEMPLATES, ``out`` the stored dtype."""
    kernel = call.kernels.get((template, out))
    if kernel is None:
        kernel = _kernel(template, call.formula, kinds_of(call), precision_of(call), out)
        call.kernels[template, out] = kernel
    return kernel


def precision_of(call: Call) -> str:
    """float64 when an operand is, else float32."""
    return "float64" if any(operand.dtype == "F64" for operand in call.operands()) else "float32"


def kinds_of(call: Call) -> Kinds:
    """What each argument is, as far as generated code depends on it."""
    return tuple((name, _kind(value)) for name, value in call.arguments.items())


def _kind(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_kind(item) for item in value)
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int | float | Step):
        return "value"
    if isinstance(value, Draw):
        return "draw"
    return "mask" if isinstance(value, Mask) else value.dtype


_LOADING = threading.Lock()


@cache
def _kernel(template: str, formula: Formula, kinds: Kinds, precision: str, out: str) -> Kernel:
    text = _module_text(template, formula, kinds, precision, out)
    with _LOADING:
        return _load(text).run  # type: ignore[no-any-return]


class _Arguments:
    """The generated code of a kernel's arguments: parameters, loads, and the formula's call."""

    def __init__(self, kinds: Kinds) -> None:
        self.parameters: list[str] = []
        self.arrays: list[str] = []
        self.draws: list[int] = []
        self.loads: list[str] = []
        self.checks: list[str] = []
        self.formula = ", ".join(f"{name}={self._expression(kind)}" for name, kind in kinds)

    def _expression(self, kind: Any) -> str:
        if isinstance(kind, tuple) and set(kind) == {"value"}:
            return self._parameter("v")
        if isinstance(kind, tuple):
            return "(" + "".join(self._scalar(item) + ", " for item in kind) + ")"
        return self._scalar(kind)

    def _scalar(self, kind: str) -> str:
        n = len(self.parameters)
        if kind in ("True", "False"):
            return kind
        if kind == "value":
            return self._parameter("v")
        if kind == "draw":
            self.draws.append(n)
            return f"(w{n}[i] >= {self._parameter('k')}[2])"
        self.arrays.append(self._parameter("a"))
        if kind == "mask":
            return f"(a{n}[i] != 0)"
        self.loads.append(f"x{n} = PRECISION(load_{kind}(a{n}[i]))")
        self.checks.append(f"nonfinite_{kind}(a{n}[i])")
        return f"x{n}"

    def _parameter(self, letter: str) -> str:
        self.parameters.append(f"{letter}{len(self.parameters)}")
        return self.parameters[-1]


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
    blocks = [f"philox_block(k{n}[0], k{n}[1], block, words{n})" for n in arguments.draws]
    blocks += ["shift = (block << 10) - start", "low, high = max(shift, 0), min(shift + 1024, total)"]
    blocks += [f"w{n} = words{n}[low - shift : high - shift]" for n in arguments.draws]
    arrays = [*arguments.arrays, *out]
    blocks += [f"{name} = all_{name}[low:high]" for name in arrays]
    blocks += ["count = high - low", "for i in range(count):", *_deeper(element), *(after or [])]
    return [
        *(f"all_{name} = {name}" for name in arrays),
        *(f"words{n} = np.empty(1024, np.uint32)" for n in arguments.draws),
        "total = count",
        "for block in range(start >> 10, (start + total + 1023) >> 10):",
        *_deeper(blocks),
    ]


def _deeper(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]


def _function(parameters: list[str], lines: list[str], name: str = "run") -> str:
    return "\n".join([f"def {name}({', '.join(parameters)}):", *_deeper(lines)]) + "\n"


def _map(arguments: _Arguments, out: str) -> str:
    """Write the formula's value; report non-finite inputs (1) and outputs (2)."""
    value = f"PRECISION(formula({arguments.formula}))"
    body = [
        f"y = store_{out}({f'narrow_PRECISION({value})' if out in ('BF16', 'F16') else value})",
        "out[i] = y",
    ]
    body += [f"bad_in |= {check}" for check in arguments.checks] + [f"bad_out |= nonfinite_{out}(y)"]
    lines = ["count, bad_in, bad_out = out.shape[0], False, False", *_loop(arguments, body, ("out",))]
    lines += ["return (1 if bad_in else 0) + (2 if bad_out else 0)"]
    return _function(["start", "out", *arguments.parameters], lines)


def _count(arguments: _Arguments, out: str) -> str:
    """Histogram of |value| as bits: what lies below ``bottom``, and bins of 2^width bits from there.

    A block's magnitudes are computed first, in vectors; only filling the histogram goes one by one, and its
    branch is rarely taken: below ``bottom`` the difference wraps round to a huge number.
    """
    body = [
        f"u = magnitude_PRECISION(PRECISION(formula({arguments.formula})))",
        "nan |= u > NAN_ABOVE",
        "below += u < bottom",
        "above[i] = u - bottom",
    ]
    fill = ["for i in range(count):", "    if above[i] < span:", "        histogram[above[i] >> width] += 1"]
    lines = ["below, nan, span = 0, False, MAGNITUDE(histogram.shape[0] << width)"]
    lines += ["above = np.empty(1024, np.MAGNITUDE)", *_loop(arguments, body, after=fill), "return below, nan"]
    return _function(["start", "count", "bottom", "width", "histogram", *arguments.parameters], lines)


def _sample(arguments: _Arguments, out: str) -> str:
    """|value| as bits, element by element."""
    body = [f"out[i] = magnitude_PRECISION(PRECISION(formula({arguments.formula})))"]
    loop = _loop(arguments, body, ("out",))
    return _function(["start", "out", *arguments.parameters], ["count = out.shape[0]", *loop])


def _equal(arguments: _Arguments, out: str) -> str:
    """How many |value| lie above the bits ``wanted``, and how many have exactly these."""
    body = [f"u = magnitude_PRECISION(PRECISION(formula({arguments.formula})))"]
    body += ["above += u > wanted", "equal += u == wanted"]
    lines = ["above, equal = 0, 0", *_loop(arguments, body), "return above, equal"]
    return _function(["start", "count", "wanted", *arguments.parameters], lines)


def _sums(arguments: _Arguments, out: str) -> str:
    """Sums of the numbers that the formula returns, or (``products``) of their pairs, per block of 4096.

    ``fill`` writes each number into a row of its own; the rows of a block stay in the fastest cache.
    """
    width = int(out)
    rows = [f"r{k}" for k in range(width)]
    body = [f"y = formula({arguments.formula})", *(f"r{k}[i] = y[{k}]" for k in range(width))]
    fill = _function(["start", "count", *rows, *arguments.parameters], _loop(arguments, body, tuple(rows)), "fill")
    slices = {name: f"{name}[begin : begin + size]" for name in arguments.arrays}
    passed = [*(f"{row}[:size]" for row in rows), *(slices.get(name, name) for name in arguments.parameters)]
    pairs = [(a, b) for a in range(width) for b in range(a, width)]
    lines = [
        *(f"{row} = np.empty({BLOCK}, np.PRECISION)" for row in rows),
        "for part in range(partials.shape[0]):",
        f"    begin = part * {BLOCK}",
        f"    size = min({BLOCK}, count - begin)",
        f"    fill(start + begin, size, {', '.join(passed)})",
        "    if products:",
        *(f"        partials[part, {n}] = dot(r{a}[:size], r{b}[:size])" for n, (a, b) in enumerate(pairs)),
        "    else:",
        *(f"        partials[part, {k}] = total(r{k}[:size])" for k in range(width)),
    ]
    run = _function(["start", "count", "products", "partials", *arguments.parameters], lines)
    return "from smelt.kernels.sums import dot, total\n" + _jitted(fill) + "\n\n@njit(cache=True, **_FAST)\n" + run


TEMPLATES: dict[str, Callable[[_Arguments, str], str]] = {
    "map": _map,
    "count": _count,
    "sample": _sample,
    "equal": _equal,
    "sums": _sums,
}


def _module_text(template: str, formula: Formula, kinds: Kinds, precision: str, out: str) -> str:
    """The whole generated module, every function jitted, every constant pinned."""
    source = source_of(formula)
    magnitude, nan_above = ("uint32", "0x7F800000") if precision == "float32" else ("uint64", "0x7FF0000000000000")
    constants = [f"{name} = np.{precision}({value!r})" for name, value in sorted(source.constants.items())]
    arguments = _Arguments(kinds)
    kernel = TEMPLATES[template](arguments, out).replace("PRECISION", precision)
    kernel = kernel.replace("np.MAGNITUDE", f"np.{magnitude}").replace("MAGNITUDE", f"np.{magnitude}")
    parts = [
        "import numpy as np\nfrom numba import njit\nfrom numpy import float32, float64",
        "from smelt.kernels.scalars import *\nfrom smelt.kernels.scalars import _FAST",
        "\n".join([*constants, f"NAN_ABOVE = np.{magnitude}({nan_above})"]),
        _jitted(source.text),
        f"formula = {source.name}",
        kernel if template == "sums" else "@njit(cache=True, **_FAST)\n" + kernel,
    ]
    return "\n\n".join(part for part in parts if part)


def _jitted(text: str) -> str:
    return text.replace("\ndef ", "\n@njit(**_FAST)\ndef ") if text.startswith("\n") else _jitted("\n" + text)


def _load(text: str) -> Any:
    """Import the generated module, from the cache folder when it can be written."""
    name = "smelt_kernel_" + hashlib.sha256((text + _environment()).encode()).hexdigest()[:32]
    if name not in sys.modules:
        path = _cache_folder() / f"{name}.py"
        storage.write_atomically(path, text.encode())
        if storage.read_small(path, 1 << 24) != text.encode():
            raise OperationFailed(f"{show(path)} was altered: remove the kernel cache and try again")
        specification = importlib.util.spec_from_file_location(name, path)
        if specification is None or specification.loader is None:
            raise ImportError(f"cannot import the generated kernel {path}")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


@cache
def _environment() -> str:
    """What else decides the machine code: the scalar building blocks and the compiler's version."""
    import numba

    from . import scalars, sums

    texts = [storage.read_small(Path(str(module.__file__)), 1 << 20) for module in (scalars, sums)]
    return f"{hashlib.sha256(b''.join(texts)).hexdigest()} {numba.__version__}"


@cache
def _cache_folder() -> Path:
    """$SMELT_CACHE, else the user's cache folder, else a private temporary one."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(os.environ.get("SMELT_CACHE") or os.path.join(home, "smelt")) / "kernels"
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="smelt-kernels-"))

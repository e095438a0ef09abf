"""Scalar building blocks of the compiled kernels: bits in, numbers out, and back.

Loads are exact. Stores round once, to nearest with ties to even, and write one canonical NaN, so that the
same value gives the same bits whatever computed it. Numba widens integer arithmetic to 64 bits: results are cut
to 32 again where that lets vectors hold twice as many.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

#: How everything here is compiled: no reference counts, no bounds checks, division by zero as IEEE 754 has it;
#: no fast-math and no contraction, so that the bits are those of numpy and torch.
FAST = {
    "error_model": "numpy", "boundscheck": False, "_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True,
}  # fmt: skip

_16, _13, _1 = np.uint32(16), np.uint32(13), np.uint32(1)
_HALF_SIGN, _MAGNITUDE = np.uint32(0x8000), np.uint32(0x7FFFFFFF)
_EXPONENT32, _EXPONENT64 = np.uint32(0x7F800000), np.uint64(0x7FF0000000000000)
_MAGNITUDE64 = np.uint64(0x7FFFFFFFFFFFFFFF)
_NAN32, _NAN64 = np.uint32(0x7FC00000), np.uint64(0x7FF8000000000000)


def _cast(source: Any, target: Any, llvm: Any) -> Any:
    """An intrinsic that reinterprets the bits of ``source`` as ``target``.

    Numba widens integer arithmetic to 64 bits, so any integer is accepted and cut to the source's width.
    """

    def typing(typing_context: Any, value: Any) -> Any:
        if value != source and not (isinstance(value, types.Integer) and isinstance(source, types.Integer)):
            return None

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(context.cast(builder, arguments[0], value, source), llvm)

        return target(value), emit

    return intrinsic(typing)


float32_of = _cast(types.uint32, types.float32, ir.FloatType())
bits32_of = _cast(types.float32, types.uint32, ir.IntType(32))
float64_of = _cast(types.uint64, types.float64, ir.DoubleType())
bits64_of = _cast(types.float64, types.uint64, ir.IntType(64))


@njit(**FAST)
def where(condition: Any, yes: Any, no: Any) -> Any:
    return yes if condition else no


@njit(**FAST)
def sqrt(x: Any) -> Any:
    return np.sqrt(x)


@njit(**FAST)
def load_BF16(bits: Any) -> Any:  # noqa: N802
    return float32_of(np.uint32(bits) << _16)


@njit(**FAST)
def load_F16(bits: Any) -> Any:  # noqa: N802
    """Shift the exponent and mantissa into place, then scale by 2^112: exact, subnormals included."""
    magnitude = np.uint32((np.uint32(bits) & np.uint32(0x7FFF)) << _13)
    value = float32_of(magnitude) * float32_of(np.uint32(0x77800000))
    special = magnitude >= np.uint32(0x0F800000)
    out = (bits32_of(value) | _EXPONENT32) if special else bits32_of(value)
    return float32_of(out | ((np.uint32(bits) & _HALF_SIGN) << _16))


@njit(**FAST)
def load_F32(value: Any) -> Any:  # noqa: N802
    return value


@njit(**FAST)
def load_F64(value: Any) -> Any:  # noqa: N802
    return value


@njit(**FAST)
def store_F64(x: Any) -> Any:  # noqa: N802
    value = np.float64(x)
    return value if value == value else float64_of(_NAN64)


@njit(**FAST)
def store_F32(x: Any) -> Any:  # noqa: N802
    value = np.float32(x)
    return value if value == value else float32_of(_NAN32)


@njit(**FAST)
def bits_F32(x: Any) -> Any:  # noqa: N802
    """What :func:`store_F32` stores, as an integer."""
    return bits32_of(store_F32(x))


@njit(**FAST)
def store_BF16(x: Any) -> Any:  # noqa: N802
    value = np.float32(x)
    bits = bits32_of(value)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> _16) & _1)) >> _16
    return np.uint16(rounded if value == value else np.uint32(0x7FC0))


@njit(**FAST)
def store_F16(x: Any) -> Any:  # noqa: N802
    """Three ranges: normal (integer rounding), subnormal (rounded by adding 0.5), overflow and Inf."""
    value = np.float32(x)
    bits = bits32_of(value)
    magnitude = np.uint32(bits & _MAGNITUDE)
    normal = np.uint32(np.uint32(magnitude + np.uint32(0xC8000FFF) + ((magnitude >> _13) & _1)) >> _13)
    small = np.uint32(bits32_of(float32_of(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000))
    rounded = small if magnitude < np.uint32(0x38800000) else normal
    rounded = np.uint32(0x7C00) if magnitude >= np.uint32(0x477FF000) else rounded
    signed = np.uint32(rounded | ((bits >> _16) & _HALF_SIGN))
    return np.uint16(signed if value == value else np.uint32(0x7E00))


@njit(**FAST)
def narrow_float32(x: Any) -> Any:
    return x


@njit(**FAST)
def narrow_float64(x: Any) -> Any:
    """float64 to float32 rounded to odd, so that the next rounding to 16 bits is the only one that counts."""
    near = np.float32(x)
    bits = bits32_of(near)
    beyond = np.uint32(1) if abs(np.float64(near)) > abs(x) else np.uint32(0)
    odd = float32_of(np.uint32(bits - beyond) | np.uint32(1))
    return odd if (np.float64(near) != x and x == x) else near


@njit(**FAST)
def magnitude_float32(x: Any) -> Any:
    """The bits of |x|: their unsigned order is the order of the magnitudes."""
    return np.uint32(bits32_of(x) & _MAGNITUDE)


@njit(**FAST)
def magnitude_float64(x: Any) -> Any:
    return bits64_of(x) & _MAGNITUDE64


@njit(**FAST)
def nonfinite_BF16(bits: Any) -> Any:  # noqa: N802
    return (bits & np.uint16(0x7F80)) == np.uint16(0x7F80)


@njit(**FAST)
def nonfinite_F16(bits: Any) -> Any:  # noqa: N802
    return (bits & np.uint16(0x7C00)) == np.uint16(0x7C00)


@njit(**FAST)
def nonfinite_F32(value: Any) -> Any:  # noqa: N802
    return (bits32_of(value) & _EXPONENT32) == _EXPONENT32


@njit(**FAST)
def nonfinite_F64(value: Any) -> Any:  # noqa: N802
    return (bits64_of(value) & _EXPONENT64) == _EXPONENT64


_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _32, _8 = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(8)


@njit(**FAST)
def _two_rounds(x: Any, k0: Any, k1: Any) -> Any:
    """Two Philox rounds; the words are 32 bits wide but held in 64, which is how vector units multiply."""
    p0, p1 = _M0 * (x[0] & _LOW), _M1 * (x[2] & _LOW)
    y = ((p1 >> _32) ^ x[1] ^ k0, p1 & _LOW, (p0 >> _32) ^ x[3] ^ k1, p0 & _LOW)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    p0, p1 = _M0 * (y[0] & _LOW), _M1 * (y[2] & _LOW)
    return ((p1 >> _32) ^ y[1] ^ k0, p1 & _LOW, (p0 >> _32) ^ y[3] ^ k1, p0 & _LOW)


@njit(**FAST)
def _key(key: Any, step: Any, rounds: Any) -> Any:
    return (np.uint64(key) + np.uint64(rounds) * step) & _LOW


@njit(**FAST)
def drawn(word: Any, density: Any) -> Any:
    """Whether a random word keeps an element of this density; exact, as ``random.drawn``."""
    return np.float64(word) >= (1.0 - np.float64(density)) * 4294967296.0


@njit(**FAST)
def philox_block(key0: Any, key1: Any, block: Any, words: Any) -> None:
    """Fill ``words`` (1024 uint32) with block number ``block`` of the stream (key0, key1).

    Philox 4x32-10 (Salmon et al., SC 2011) on the counters 256*block .. 256*block + 255; word w of counter
    c lands at 256*w + c, so that each word is written as one contiguous vector. The ten rounds are written
    out because LLVM vectorises a loop over counters only when it has no loop inside.
    """
    counter = np.uint64(block) << _8
    low, high, zero = counter & _LOW, counter >> _32, np.uint64(0)
    a0, a1 = _key(key0, _W0, 0), _key(key1, _W1, 0)
    b0, b1 = _key(key0, _W0, 2), _key(key1, _W1, 2)
    c0, c1 = _key(key0, _W0, 4), _key(key1, _W1, 4)
    d0, d1 = _key(key0, _W0, 6), _key(key1, _W1, 6)
    e0, e1 = _key(key0, _W0, 8), _key(key1, _W1, 8)
    for c in range(256):
        x = _two_rounds((low + np.uint64(c), high, zero, zero), a0, a1)
        x = _two_rounds(_two_rounds(_two_rounds(_two_rounds(x, b0, b1), c0, c1), d0, d1), e0, e1)
        words[c], words[256 + c] = np.uint32(x[0]), np.uint32(x[1])
        words[512 + c], words[768 + c] = np.uint32(x[2]), np.uint32(x[3])

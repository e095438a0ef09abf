"""The element types that checkpoints hold, and how their bits are stored in numpy arrays.

bfloat16 and float16 travel as uint16 and the 8-bit floats as uint8, so that the compiled kernels can read
them without knowing numpy extension types. Sub-byte types are known for their size only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class DType:
    """One safetensors dtype. ``value_type`` names the numpy (or ml_dtypes) type of its values."""

    code: str
    bits: int
    storage: type[np.generic]
    value_type: str
    floating: bool = False
    arithmetic: bool = False  # the kernels can load and store it
    exponent_mask: int = 0  # all exponent bits: set together only in Inf and NaN

    @cached_property
    def values(self) -> np.dtype[Any]:
        """The numpy dtype of the values (bfloat16 and the 8-bit floats come from ml_dtypes)."""
        try:
            return np.dtype(self.value_type)
        except TypeError:
            import ml_dtypes

            values: np.dtype[Any] = np.dtype(getattr(ml_dtypes, self.value_type))
            return values

    def as_values(self, storage: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """View stored bits as values, without a copy."""
        return storage.view(self.values)

    def as_storage(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """View values as stored bits, without a copy."""
        return values.view(self.storage)


def _table(*rows: DType) -> dict[str, DType]:
    return {row.code: row for row in rows}


#: Every dtype that a safetensors header may name (format version of safetensors 0.8).
DTYPES: dict[str, DType] = _table(
    DType("F64", 64, np.float64, "float64", True, True, 0x7FF0000000000000),
    DType("F32", 32, np.float32, "float32", True, True, 0x7F800000),
    DType("BF16", 16, np.uint16, "bfloat16", True, True, 0x7F80),
    DType("F16", 16, np.uint16, "float16", True, True, 0x7C00),
    DType("F8_E4M3", 8, np.uint8, "float8_e4m3fn", True),
    DType("F8_E5M2", 8, np.uint8, "float8_e5m2", True),
    DType("F8_E8M0", 8, np.uint8, "float8_e8m0fnu", True),
    DType("F8_E4M3FNUZ", 8, np.uint8, "float8_e4m3fnuz", True),
    DType("F8_E5M2FNUZ", 8, np.uint8, "float8_e5m2fnuz", True),
    DType("F6_E2M3", 6, np.uint8, "uint8", True),
    DType("F6_E3M2", 6, np.uint8, "uint8", True),
    DType("F4", 4, np.uint8, "uint8", True),
    DType("I64", 64, np.int64, "int64"),
    DType("U64", 64, np.uint64, "uint64"),
    DType("C64", 64, np.complex64, "complex64"),
    DType("I32", 32, np.int32, "int32"),
    DType("U32", 32, np.uint32, "uint32"),
    DType("I16", 16, np.int16, "int16"),
    DType("U16", 16, np.uint16, "uint16"),
    DType("I8", 8, np.int8, "int8"),
    DType("U8", 8, np.uint8, "uint8"),
    DType("BOOL", 8, np.uint8, "bool"),
)

_BY_VALUE = {row.value_type: row.code for row in reversed(DTYPES.values()) if row.bits >= 8}

#: The names that recipes use, and the usual abbreviations.
NAMES: dict[str, str] = {
    "float64": "F64", "double": "F64", "fp64": "F64", "f64": "F64",
    "float32": "F32", "float": "F32", "fp32": "F32", "f32": "F32",
    "float16": "F16", "half": "F16", "fp16": "F16", "f16": "F16",
    "bfloat16": "BF16", "bf16": "BF16",
}  # fmt: skip


def code_of(values: np.dtype[Any]) -> str:
    """The safetensors code of a numpy (or ml_dtypes) dtype; KeyError when the format has none."""
    return _BY_VALUE[values.name]


def name_of(code: str) -> str:
    """The long name of a dtype, as config.json and recipes write it: "BF16" -> "bfloat16"."""
    return DTYPES[code].value_type


def narrowed(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """float64 to float32 rounded to odd: rounding that to 16 bits equals rounding the float64 once."""
    with np.errstate(over="ignore", invalid="ignore"):
        near = values.astype(np.float32)
        bits = near.view(np.uint32)
        odd = (bits - (np.abs(near.astype(np.float64)) > np.abs(values))) | np.uint32(1)
        inexact = (near != values) & (values == values)
    return np.where(inexact, odd.astype(np.uint32).view(np.float32), near)


def rounded(values: npt.NDArray[np.float64], code: str) -> npt.NDArray[Any]:
    """float64 rounded once to a floating dtype, as values."""
    once = narrowed(values) if DTYPES[code].bits == 16 else values
    with np.errstate(over="ignore"):
        return once.astype(DTYPES[code].values)

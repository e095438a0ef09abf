"""GPTQ and AWQ: the transpose of the weight, codes of 2, 3, 4 or 8 bits in words of 32, a zero point per group.

    GPTQ   weight[o, i] = scales[g, o] * (qweight[i, o] - ((qzeros[g, o] + 1) mod 2^bits)),   g = g_idx[i]
           v2 has no + 1
    AWQ    weight[o, i] = scales[g, o] * (qweight[i, o] - qzeros[g, o]),         g = i // group_size

Frantar et al., "GPTQ", ICLR 2023, https://arxiv.org/abs/2210.17323; Lin et al., "AWQ", MLSys 2024,
https://arxiv.org/abs/2306.00978. The layouts are those of AutoGPTQ, GPTQModel and AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputRejected, show
from ...kernels.dequantise import Floats, Packing
from ...kernels.nibbles import in_order
from ..base import TensorInfo
from .matrix import Codes, Matrix
from .planes import Grid, Index, Plane, StoredPlane, Window
from .stored import Group, Stored
from .turned import Bands, Turned

_CODES = np.arange(256, dtype=np.float32)
_SCALES = ("F16", "BF16", "F32")


def gptq_groups(stored: Stored, settings: Mapping[str, Any], bands: Bands) -> Iterator[Group]:
    """One group per ``qweight``. InputRejected for settings and shapes that do not fit."""
    offset = _offset(stored, settings)
    for prefix, codes in stored.ending(".qweight"):
        scales, zeros = _beside(stored, prefix, codes)
        words, columns = codes.shape
        index = stored.tensors.get(f"{prefix}.g_idx")
        bits, rows = _sizes(stored, settings, codes, index)
        groups = scales.shape[0]
        stored.of_shape(scales, (groups, columns))
        stored.of_shape(zeros, (groups, -(-columns * bits // 32)))
        if words * 32 != rows * bits:
            raise stored.rejected(codes, f"has {words} rows of words, which are not {rows} codes of {bits} bits")
        row_index = None if index is None else Index(stored.checkpoint, index.name, rows, groups)
        packed = Codes(stored.checkpoint, zeros.name, Packing(bits), groups, columns, zeros.shape[1])
        zero: Plane = Matrix(packed, (_CODES + np.float32(offset)) % np.float32(1 << bits), _ones(), "F32")
        if settings.get("sym") is True:
            zero = _Confirmed(stored, zeros, zero, 1 << (bits - 1))
        height = _height(stored, settings, scales, rows)
        grid = Grid(_plane(stored, scales), height, 1, zero, row_index)
        codes_down = Codes(stored.checkpoint, codes.name, Packing(bits, down=True), rows, columns, columns)
        matrix = Matrix(codes_down, _CODES, grid, scales.dtype)
        yield _group(stored, prefix, [codes, scales, zeros, index], matrix, bands)


def awq_groups(stored: Stored, settings: Mapping[str, Any], bands: Bands) -> Iterator[Group]:
    """One group per ``qweight`` in the layout of version gemm. InputRejected for another one."""
    label, version, bits = stored.checkpoint.label, settings.get("version", "gemm"), settings.get("bits", 4)
    if str(version).lower() != "gemm" or bits != 4:
        raise InputRejected(
            f"{label}: AWQ of version {show(version)} with {show(bits)} bits, this version reads gemm with 4 bits"
        )
    for prefix, codes in stored.ending(".qweight"):
        scales, zeros = _beside(stored, prefix, codes)
        rows, words = codes.shape
        groups, columns = scales.shape[0], 8 * words
        stored.of_shape(scales, (groups, columns))
        stored.of_shape(zeros, (groups, words))
        zero = Matrix(_awq(stored, zeros, groups, columns), _CODES, _ones(), "F32")
        grid = Grid(_plane(stored, scales), _height(stored, settings, scales, rows), 1, zero)
        matrix = Matrix(_awq(stored, codes, rows, columns), _CODES, grid, scales.dtype)
        yield _group(stored, prefix, [codes, scales, zeros], matrix, bands)


def _group(
    stored: Stored, prefix: str, parts: list[TensorInfo | None], matrix: Matrix, bands: Bands
) -> Group:  # fmt: skip
    codes = matrix.codes
    info = stored.tensors[codes.name]
    logical = stored.logical(info, f"{prefix}.weight", (codes.columns, codes.rows), matrix.dtype)
    return Group(logical, tuple(part.name for part in parts if part is not None), Turned(matrix, bands))


def _beside(stored: Stored, prefix: str, codes: TensorInfo) -> tuple[TensorInfo, TensorInfo]:
    """Scales and zero points, all of them matrices."""
    scales = stored.partner(codes, f"{prefix}.scales", *_SCALES)
    zeros = stored.partner(codes, f"{prefix}.qzeros", "I32")
    for info in (stored.partner(codes, codes.name, "I32"), scales, zeros):
        if len(info.shape) != 2 or 0 in info.shape:
            raise stored.rejected(info, f"has shape {list(info.shape)}, expected a matrix")
    return scales, zeros


def _height(stored: Stored, settings: Mapping[str, Any], scales: TensorInfo, rows: int) -> int:
    """How many rows share a scale: the stated group size, which the number of groups must confirm."""
    groups, said = scales.shape[0], settings.get("group_size", -(-rows // scales.shape[0]))
    height = said if type(said) is int and said > 0 else rows
    if -(-rows // height) != groups:
        raise stored.rejected(scales, f"has {groups} groups, expected {-(-rows // height)} of {height} in {rows} rows")
    return height


def _plane(stored: Stored, scales: TensorInfo) -> StoredPlane:
    groups, columns = scales.shape
    return StoredPlane(stored.checkpoint, scales.name, groups, columns)


def _ones() -> Grid:
    return Grid(lambda window: np.ones((1, 1), np.float32), 1 << 62, 1 << 62)


def _awq(stored: Stored, codes: TensorInfo, rows: int, columns: int) -> Codes:
    return Codes(stored.checkpoint, codes.name, Packing(4), rows, columns, columns // 8, _in_order)


def _in_order(words: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The words with their codes in the order of the columns."""
    in_order(words.reshape(-1).view(np.uint32))
    return words


def _offset(stored: Stored, settings: Mapping[str, Any]) -> int:
    """What is added to stored zero points."""
    said = settings.get("checkpoint_format") or "gptq"
    if said not in ("gptq", "gptq_v2"):
        raise InputRejected(
            f"{stored.checkpoint.label}: GPTQ with checkpoint_format {show(said)}, this version reads gptq and gptq_v2"
        )
    return 1 if said == "gptq" else 0


def _sizes(
    stored: Stored, settings: Mapping[str, Any], codes: TensorInfo, index: TensorInfo | None
) -> tuple[int, int]:  # fmt: skip
    """Bits per code, and codes per column: the index has one entry for each; without it bits come from the config."""
    if index is not None:
        if len(index.shape) != 1 or index.dtype not in ("I32", "I64") or not index.count:
            raise stored.rejected(index, f"is {index.dtype} of shape {list(index.shape)}, expected a line of I32")
        rows = index.shape[0]
        bits = codes.shape[0] * 32 // rows
        if (said := settings.get("bits", bits)) != bits and not settings.get("dynamic"):
            raise stored.rejected(index, f"has {rows} entries, which are {bits} bits for each code, not {show(said)}")
    else:
        bits = settings.get("bits", 0)
        rows = codes.shape[0] * 32 // bits if type(bits) is int and bits > 0 else 0
    if type(bits) is not int or bits not in (2, 3, 4, 8):
        raise stored.rejected(codes, f"has codes of {show(bits)} bits, this version reads GPTQ with 2, 3, 4 and 8")
    return bits, rows


class _Confirmed:
    """Zero points that must all be in the middle of the codes, as symmetric quantisation has them.

    Files that say they are v1 and hold v2 zero points, or the reverse, are known: nothing is guessed.
    """

    def __init__(self, stored: Stored, zeros: TensorInfo, plane: Plane, middle: int) -> None:
        self._stored, self._zeros, self._plane, self._middle = stored, zeros, plane, middle

    def __call__(self, window: Window) -> Floats:
        found = self._plane(window)
        wrong = found[found != self._middle]
        if len(wrong):
            raise self._stored.rejected(
                self._zeros,
                f"gives the zero point {wrong[0]:g} where symmetric quantisation has {self._middle}: set "
                "checkpoint_format in quantization_config to gptq or gptq_v2, whichever is right, or sym to false",
            )
        return found

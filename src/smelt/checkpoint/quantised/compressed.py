"""compressed-tensors: integers packed into words, integers and FP8 one to a byte, FP4 two to a byte.

    weight = (code - zero point) * scale, both shared by a tensor, a row, a block, or a group of columns

What the config says of each kind of weight is matched to modules by the shapes of their tensors: its patterns of
names are never run. https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ...errors import InputRejected, show
from ...kernels.dequantise import Packing
from ..base import TensorInfo
from .fp4 import fp4_group
from .matrix import Codes, Matrix
from .planes import Grid, Index, Plane, StoredPlane
from .scaled import FLOATS, FP8, Block, block_of, scaled
from .stored import Group, Stored, matrices

_FORMATS = {
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision",
}  # fmt: skip

Arguments = Mapping[str, Any]


def compressed_groups(stored: Stored, settings: Mapping[str, Any]) -> Iterator[Group]:
    """One group per compressed weight. InputRejected for formats that are not read and for what does not fit."""
    known = _arguments(stored, settings)
    for prefix, codes in stored.ending(".weight_packed"):
        if codes.dtype == "U8":
            yield fp4_group(stored, codes, f"{prefix}.weight", f"{prefix}.weight")
        else:
            yield _packed(stored, prefix, stored.partner(codes, codes.name, "I32"), known)
    for _, codes in stored.ending(".weight"):
        if codes.dtype in (*FP8, "I8") and f"{codes.name}_scale" in stored.tensors:
            yield _bytes(stored, codes, known)


def _arguments(stored: Stored, settings: Mapping[str, Any]) -> list[Arguments]:
    """The different ways in which weights are said to be quantised."""
    groups = settings.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    schemes = [scheme for scheme in schemes if isinstance(scheme, Mapping)]
    sparse = settings.get("sparsity_config") or {}
    formats = [settings.get("format"), *(scheme.get("format") for scheme in schemes)]
    formats += [sparse.get("format", "dense")] if isinstance(sparse, Mapping) else [sparse]
    for name in formats:
        if name is not None and name != "dense" and name not in _FORMATS:
            raise InputRejected(
                f"{stored.checkpoint.label}: compressed-tensors of format {show(name)}, this version reads "
                + ", ".join(sorted(_FORMATS))
            )
    if settings.get("transform_config"):
        raise InputRejected(
            f"{stored.checkpoint.label}: its weights are rotated (transform_config), which this version does not undo"
        )
    found = [scheme["weights"] for scheme in schemes if isinstance(scheme.get("weights"), Mapping)]
    return [each for place, each in enumerate(found) if each not in found[:place]]


# --- one code to a byte ---------------------------------------------------------------------------------


def _bytes(stored: Stored, codes: TensorInfo, known: list[Arguments]) -> Group:
    scale = stored.partner(codes, f"{codes.name}_scale", *FLOATS)
    zero = stored.tensors.get(f"{codes.name}_zero_point")
    return scaled(stored, codes, scale, _blocks(stored, known), _dtype(stored, scale), _used(stored, zero, "I8"))


def _blocks(stored: Stored, known: list[Arguments]) -> list[Block]:
    """The granularities that the config states beyond tensors and rows."""
    found: list[Block] = []
    for arguments in known:
        block = block_of(stored, arguments.get("block_structure"))
        found += [block] if block else []
        size = arguments.get("group_size")
        found += [(1, size)] if type(size) is int and size > 0 else []
    return found


def _used(stored: Stored, zero: TensorInfo | None, dtype: str) -> TensorInfo | None:
    """Zero points, where there are any that are not of floats (which older files store, all zero)."""
    if zero is None or zero.dtype == dtype:
        return zero
    if zero.dtype in (*FP8, "F32", "BF16", "F16", "I8") and not np.any(stored.whole(zero).astype(np.float32)):
        return None
    raise stored.rejected(zero, f"is {zero.dtype}, expected {dtype}")


def _dtype(stored: Stored, scale: TensorInfo) -> str:
    """The dtype of the scales, as the library has it; where they are wider than weights are, the model's."""
    return scale.dtype if scale.dtype in ("BF16", "F16") else stored.plain_dtype()


# --- packed ---------------------------------------------------------------------------------------------


def _packed(stored: Stored, prefix: str, codes: TensorInfo, known: list[Arguments]) -> Group:
    scale = stored.partner(codes, f"{prefix}.weight_scale", "F32", "BF16", "F16")
    shape = stored.partner(codes, f"{prefix}.weight_shape", "I64", "I32")
    if len(codes.shape) < 2 or (len(scale.shape) != len(codes.shape) and scale.count != 1):
        raise stored.rejected(codes, f"has shape {list(codes.shape)}, its scales {list(scale.shape)}")
    bits, group, columns = _fitting(stored, codes, scale, shape, known)
    logical = (*codes.shape[:-1], columns)
    rows, _ = matrices(logical)
    groups = -(-columns // group)
    zero = stored.tensors.get(f"{prefix}.weight_zero_point")
    index = stored.tensors.get(f"{prefix}.weight_g_idx")
    middle = np.float32(1 << (bits - 1))
    table = np.arange(256, dtype=np.float32) - middle
    plane: Plane = StoredPlane(stored.checkpoint, scale.name, 1 if scale.count == 1 else rows, groups, scale.count == 1)
    height = rows if scale.count == 1 else 1
    zeros = _zeros(stored, zero, bits, (*codes.shape[:-2], rows, groups), table) if zero is not None else None
    grid = Grid(plane, height, group, zeros, column_index=_index(stored, index, columns, groups))
    packed = Codes(stored.checkpoint, codes.name, Packing(bits), rows, columns, codes.shape[-1])
    matrix = Matrix(packed, table, grid, _dtype(stored, scale))
    parts = [part.name for part in (codes, scale, shape, zero, index) if part is not None]
    return Group(stored.logical(codes, f"{prefix}.weight", logical, matrix.dtype), tuple(parts), matrix)


def _fitting(
    stored: Stored, codes: TensorInfo, scale: TensorInfo, shape: TensorInfo, known: list[Arguments]
) -> tuple[int, int, int]:  # fmt: skip
    """Bits, group size and columns, as the only one of the config's kinds that fits the shapes has them."""
    found = {fit for arguments in known if (fit := _fit(stored, codes, scale, shape, arguments)) is not None}
    if len(found) != 1:
        said = ", ".join(
            f"{show(a.get('num_bits'))} bits by {show(a.get('strategy'))} of {show(a.get('group_size'))}" for a in known
        )
        raise stored.rejected(
            codes,
            f"of shape {list(codes.shape)} with scales {list(scale.shape)} fits {len(found)} of the kinds in "
            f"quantization_config, expected one ({said or 'none is given'})",
        )
    return found.pop()


def _fit(
    stored: Stored, codes: TensorInfo, scale: TensorInfo, shape: TensorInfo, arguments: Arguments
) -> tuple[int, int, int] | None:  # fmt: skip
    bits, size = arguments.get("num_bits"), arguments.get("group_size")
    if type(bits) is not int or not 1 <= bits <= 8 or arguments.get("type", "int") != "int":
        return None
    if type(size) is int and size > 0 and scale.shape[:-1] == codes.shape[:-1]:
        columns = scale.shape[-1] * size
    elif scale.count == 1 or scale.shape == (*codes.shape[:-1], 1):
        columns = int(stored.whole(shape).reshape(-1)[-1]) if shape.count else 0
        size = columns
    else:
        return None
    return (bits, size, columns) if columns > 0 and -(-columns * bits // 32) == codes.shape[-1] else None


def _zeros(stored: Stored, zero: TensorInfo, bits: int, shape: tuple[int, ...], table: Any) -> Plane:
    """Zero points, packed down the rows with the same offset as codes."""
    *outer, rows, groups = shape
    stored.partner(zero, zero.name, "I32")
    stored.of_shape(zero, (*outer, -(-rows * bits // 32), groups))
    codes = Codes(stored.checkpoint, zero.name, Packing(bits, down=True), rows, groups, groups)
    ones = Grid(lambda window: np.ones((1, 1), np.float32), 1 << 62, 1 << 62)
    return Matrix(codes, table, ones, "F32")


def _index(stored: Stored, index: TensorInfo | None, columns: int, groups: int) -> Index | None:
    """Which group each column is in, where they are not in order; -1 throughout says that they are."""
    if index is None:
        return None
    stored.of_shape(stored.partner(index, index.name, "I32", "I64"), (columns,))
    return None if (stored.whole(index) == -1).all() else Index(stored.checkpoint, index.name, columns, groups)

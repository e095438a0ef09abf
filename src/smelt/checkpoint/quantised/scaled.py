"""Matrices of 8-bit codes, one to a byte, beside a tensor of scales: FP8 and INT8 in all their granularities.

    weight[r, c] = code[r, c] * scale[r // height, c // width]

The scales are one number, one per row, one per column, or one per block; blocks at the lower and right edge may be
cut short, as in DeepSeek-V3 (https://huggingface.co/deepseek-ai/DeepSeek-V3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from ...errors import InputRejected, show
from ...kernels.dequantise import Packing
from ..base import TensorInfo
from .matrix import Codes, Matrix
from .planes import Grid, Plane, StoredPlane
from .stored import Group, Stored, matrices, values_of_codes

FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
FLOATS = ("F32", "BF16", "F16", "F8_E8M0", "U8")

#: What the names of scales end in, and the blocks that they are taken for where nothing is said.
_SUFFIXES = {"_scale_inv": (128, 128), "_scale": (1, 32)}

Block = tuple[int, int]


def fp8_groups(stored: Stored, settings: Mapping[str, Any]) -> Iterator[Group]:
    """FP8 weights with ``_scale_inv`` or ``_scale`` beside them (quant_method fp8, fbgemm_fp8, modelopt)."""
    block = block_of(stored, settings.get("weight_block_size"))
    for name, info in stored.tensors.items():
        suffix = next((suffix for suffix in _SUFFIXES if name + suffix in stored.tensors), None)
        if info.dtype in FP8 and suffix is not None:
            scale = stored.partner(info, name + suffix, *FLOATS)
            yield scaled(stored, info, scale, [block or _SUFFIXES[suffix]], stored.plain_dtype())


def block_of(stored: Stored, said: Any) -> Block | None:
    """A block size as a config states it. InputRejected when it is none."""
    if said is None:
        return None
    if not isinstance(said, list | tuple) or len(said) != 2 or not all(type(n) is int and n > 0 for n in said):
        raise InputRejected(
            f"{stored.checkpoint.label}: quantization_config has block size {show(said)}, expected two numbers"
        )
    return said[0], said[1]


def scaled(
    stored: Stored, codes: TensorInfo, scale: TensorInfo, blocks: list[Block], dtype: str,
    zero: TensorInfo | None = None,
) -> Group:  # fmt: skip
    """The logical tensor of 8-bit codes and their scales, in one of ``blocks`` or a simpler granularity."""
    height, width, shared = granularity(stored, codes, scale, blocks)
    rows, columns = matrices(codes.shape)
    grid = -(-rows // height), -(-columns // width)
    plane = StoredPlane(stored.checkpoint, scale.name, *grid, shared)
    parts = [codes.name, scale.name]
    zeros: Plane | None = None
    if zero is not None:
        stored.of_shape(zero, scale.shape)
        zeros = StoredPlane(stored.checkpoint, zero.name, *grid, shared)
        parts.append(zero.name)
    matrix = Matrix(
        Codes(stored.checkpoint, codes.name, Packing(8), rows, columns, columns),
        values_of_codes(codes.dtype), Grid(plane, height, width, zeros), dtype,
    )  # fmt: skip
    return Group(stored.logical(codes, codes.name, codes.shape, dtype), tuple(parts), matrix)


def granularity(stored: Stored, codes: TensorInfo, scale: TensorInfo, blocks: list[Block]) -> tuple[int, int, bool]:
    """Rows and columns that share a scale, and whether one number serves all matrices.

    What shapes leave open is decided in this order: one number, rows, columns, ``blocks``. InputRejected when no
    granularity has scales of this shape.
    """
    rows, columns = matrices(codes.shape)
    if prod(scale.shape) == 1:
        return rows, columns, True
    expected = []
    for height, width in [(rows, columns), (1, columns), *blocks, (rows, 1)]:
        grid = (-(-rows // height), -(-columns // width))
        shape = (*codes.shape[:-2], *grid)
        if scale.shape in (shape, *([shape[:-1]] if grid[1] == 1 else []), *([shape[:-2]] if grid == (1, 1) else [])):
            return height, width, False
        expected.append(str(list(shape)))
    raise stored.rejected(
        scale, f"has shape {list(scale.shape)}, expected {' or '.join(expected)} for {list(codes.shape)}"
    )

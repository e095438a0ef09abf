"""Four-bit floats (E2M1): MXFP4 as gpt-oss stores it, MXFP4 and NVFP4 of compressed-tensors and ModelOpt.

    value = table[code] * scale of its 32 (MXFP4: a power of two) or 16 (NVFP4: FP8, times one number) neighbours

Open Compute Project, "Microscaling Formats (MX) Specification", 2023; https://huggingface.co/openai/gpt-oss-20b.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...kernels.dequantise import Floats, Packing
from ..base import TensorInfo
from .matrix import Codes, Matrix
from .planes import Grid, Plane, StoredPlane, Window
from .stored import Group, Stored, matrices
from .turned import Bands, Turned

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

#: The values of the 16 codes, repeated because tables have 256.
E2M1 = np.tile(np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32), 16)

_EXPONENTS = ("U8", "F8_E8M0")


def expert_groups(stored: Stored, settings: Mapping[str, Any], bands: Bands) -> Iterator[Group]:
    """gpt-oss: ``x_blocks`` [experts, out, groups, 16] and ``x_scales`` are the transposes of x [experts, in, out]."""
    for name, blocks in stored.ending("_blocks"):
        if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[-1] != 16:
            continue
        scales = stored.partner(blocks, f"{name}_scales", *_EXPONENTS)
        stored.of_shape(scales, blocks.shape[:3])
        experts, rows, groups, _ = blocks.shape
        plane = StoredPlane(stored.checkpoint, scales.name, rows, groups)
        matrix = _matrix(stored, blocks, (rows, 32 * groups), Grid(plane, 1, 32))
        info = stored.logical(blocks, name, (experts, 32 * groups, rows), "BF16")
        yield Group(info, (blocks.name, scales.name), Turned(matrix, bands))


def fp4_group(stored: Stored, codes: TensorInfo, name: str, prefix: str) -> Group:
    """One weight of two codes to a byte, MXFP4 or NVFP4 as the tensors beside it tell."""
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    rows, columns = matrices(shape)
    second = next((end for end in ("global_scale", "scale_2") if f"{prefix}_{end}" in stored.tensors), None)
    scale = stored.partner(codes, f"{prefix}_scale", *(("F8_E4M3",) if second else _EXPONENTS))
    size = 16 if second else 32
    stored.of_shape(scale, (*shape[:-1], -(-columns // size)))
    plane: Plane = StoredPlane(stored.checkpoint, scale.name, rows, -(-columns // size))
    parts = [codes.name, scale.name]
    if second:
        other = stored.partner(codes, f"{prefix}_{second}", "F32")
        stored.of_shape(other, (), (1,), shape[:-2], (*shape[:-2], 1), (*shape[:-2], 1, 1))
        number = StoredPlane(stored.checkpoint, other.name, 1, 1, other.count == 1)
        plane = _Twice(plane, number, divide=second == "global_scale")
        parts.append(other.name)
    matrix = _matrix(stored, codes, (rows, columns), Grid(plane, 1, size))
    return Group(stored.logical(codes, name, shape, "BF16"), tuple(parts), matrix)


def modelopt_groups(stored: Stored, settings: Mapping[str, Any]) -> Iterator[Group]:
    """ModelOpt's NVFP4: ``weight`` U8, ``weight_scale`` FP8 and ``weight_scale_2``, which multiplies."""
    for name, _ in stored.ending("_scale_2"):
        if name in stored.tensors and stored.tensors[name].dtype == "U8":
            yield fp4_group(stored, stored.tensors[name], name, name)


def _matrix(stored: Stored, codes: TensorInfo, shape: tuple[int, int], grid: Grid) -> Matrix:
    rows, columns = shape
    return Matrix(Codes(stored.checkpoint, codes.name, Packing(4), rows, columns, columns // 2), E2M1, grid, "BF16")


@dataclass(frozen=True)
class _Twice:
    """Scales that are scaled themselves, by one number per matrix."""

    plane: Plane
    number: Plane
    divide: bool

    def __call__(self, window: Window) -> Floats:
        number = self.number(Window(window.matrix, 0, 1, 0, 1))
        scale = self.plane(window)
        with np.errstate(all="ignore"):  # what is not finite is found among the values
            return scale / number if self.divide else scale * number

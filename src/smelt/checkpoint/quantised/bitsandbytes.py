"""bitsandbytes: NF4 and FP4 in blocks of the flattened weight, and INT8 by rows.

    4 bits   weight[k] = quant_map[code[k]] * absmax[k // blocksize]
             where absmax is quantised too: absmax = nested_quant_map[absmax] * nested_absmax[. // 256] + offset
    8 bits   weight[r, c] = code[r, c] * SCB[r] / 127

Dettmers et al., "QLoRA", NeurIPS 2023, https://arxiv.org/abs/2305.14314; Dettmers et al., "LLM.int8()", NeurIPS
2022, https://arxiv.org/abs/2208.07339.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ...kernels.dequantise import Floats, Packing
from ...kernels.dtypes import NAMES
from ..base import TensorInfo
from ..documents import brief, parse_json
from .matrix import Codes, Matrix
from .planes import Grid, Plane, StoredPlane, Window
from .stored import Group, Stored, values_of_codes

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_SIZES = tuple(1 << power for power in range(5, 13))


def bitsandbytes_groups(stored: Stored, settings: Mapping[str, Any]) -> Iterator[Group]:
    """One group per weight with a state (4 bits) or with ``SCB`` beside it (8 bits)."""
    for kind in _KINDS:
        for name, state in stored.ending(_STATE + kind):
            yield _four_bits(stored, name, stored.partner(state, name), state, kind)
    for prefix, scale in stored.ending(".SCB"):
        yield _eight_bits(stored, stored.partner(scale, f"{prefix}.weight", "I8"), scale, prefix)


# --- 4 bits ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _State:
    """What the JSON beside a weight says, checked."""

    shape: tuple[int, ...]
    dtype: str
    blocksize: int
    nested_blocksize: int
    nested_offset: float


def _four_bits(stored: Stored, name: str, codes: TensorInfo, said: TensorInfo, kind: str) -> Group:
    state = _state(stored, codes, said, kind)
    count = prod(state.shape)
    blocks = -(-count // state.blocksize)
    absmax = stored.partner(codes, f"{name}.absmax", "F32", "U8")
    table = stored.of_shape(stored.partner(codes, f"{name}.quant_map", "F32"), (16,))
    parts = [codes, said, absmax, table]
    stored.of_shape(absmax, (blocks,))
    plane: Plane = StoredPlane(stored.checkpoint, absmax.name, blocks, 1)
    if absmax.dtype == "U8":
        outer, inner = (stored.partner(codes, f"{name}.nested_{end}", "F32") for end in ("absmax", "quant_map"))
        stored.of_shape(inner, (256,))
        stored.of_shape(outer, (-(-blocks // state.nested_blocksize),))
        plane = _Nested(_nested(stored, absmax, outer, inner, state), np.float32(state.nested_offset))
        parts += [outer, inner]
    packed = Codes(stored.checkpoint, codes.name, Packing(4), blocks, state.blocksize, _items(codes, state), _low_first)
    values = np.tile(stored.whole(table), 16)
    matrix = Matrix(packed, values, Grid(plane, 1, state.blocksize), state.dtype)
    info = stored.logical(codes, name, state.shape, state.dtype)
    return Group(info, tuple(part.name for part in parts), matrix)


def _low_first(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The two codes of every byte change places: the first one is stored in the upper half."""
    both = stored.view(np.uint8)
    return (both << 4) | (both >> 4)


def _items(codes: TensorInfo, state: _State) -> int:
    """Stored elements per block: codes may lie in elements of several bytes."""
    return max(1, state.blocksize // 2 * codes.count // codes.nbytes)


def _nested(stored: Stored, absmax: TensorInfo, outer: TensorInfo, inner: TensorInfo, state: _State) -> Matrix:
    """The quantised absmax as one line."""
    blocks, size = absmax.count, state.nested_blocksize
    grid = Grid(StoredPlane(stored.checkpoint, outer.name, 1, outer.count), 1, size)
    codes = Codes(stored.checkpoint, absmax.name, Packing(8), 1, blocks, blocks)
    return Matrix(codes, stored.whole(inner), grid, "F32")


@dataclass(frozen=True)
class _Nested:
    """A line of numbers as a column, and ``offset`` added."""

    line: Matrix
    offset: np.float32

    def __call__(self, window: Window) -> Floats:
        return (self.line(Window(0, 0, 1, window.r0, window.r1)) + self.offset).reshape(-1, 1)


def _state(stored: Stored, codes: TensorInfo, said: TensorInfo, kind: str) -> _State:
    """The state of a weight. InputRejected when it is malformed, or does not fit the weight's bytes."""
    if said.dtype != "U8" or said.count > 1 << 16:
        raise stored.rejected(said, f"is {said.dtype} of {said.count} elements, expected a short JSON text as U8")
    state = parse_json(stored.whole(said).tobytes(), f"{stored.checkpoint.label}: tensor {brief(said.name)}")
    shape, dtype = state.get("shape"), NAMES.get(str(state.get("dtype")), "")
    sizes = [state.get("blocksize"), state.get("nested_blocksize", 256)]
    offset = state.get("nested_offset", 0.0)
    problems = {
        f"quant_type {brief(state.get('quant_type'))}": state.get("quant_type") == kind,
        f"shape {brief(shape)}": isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape),
        f"dtype {brief(state.get('dtype'))}": dtype in ("F32", "BF16", "F16"),
        f"blocksize {brief(sizes[0])}": type(sizes[0]) is int and sizes[0] in _SIZES,
        f"nested_blocksize {brief(sizes[1])}": type(sizes[1]) is int and sizes[1] in _SIZES,
        f"nested_offset {brief(offset)}": isinstance(offset, int | float) and bool(np.isfinite(offset)),
    }
    for problem, good in problems.items():
        if not good:
            raise stored.rejected(said, f"has {problem}, which no {kind} weight has")
    assert isinstance(shape, list)
    if -(-prod(shape) // 2) != codes.nbytes or codes.nbytes % codes.count:
        raise stored.rejected(codes, f"has {codes.nbytes} bytes, expected {-(-prod(shape) // 2)} for shape {shape}")
    return _State(tuple(shape), dtype, sizes[0], sizes[1], float(offset))


# --- 8 bits ---------------------------------------------------------------------------------------------


def _eight_bits(stored: Stored, codes: TensorInfo, scale: TensorInfo, prefix: str) -> Group:
    stored.partner(codes, scale.name, "F32")
    if len(codes.shape) != 2:
        raise stored.rejected(codes, f"has shape {list(codes.shape)}, expected a matrix")
    rows, columns = codes.shape
    stored.of_shape(scale, (rows,))
    grid = Grid(StoredPlane(stored.checkpoint, scale.name, rows, 1), 1, columns, factor=7.874015718698502e-3)
    packed = Codes(stored.checkpoint, codes.name, Packing(8), rows, columns, columns)
    matrix = Matrix(packed, values_of_codes("I8"), grid, stored.plain_dtype())
    parts = [codes.name, scale.name]
    if (layout := stored.tensors.get(f"{prefix}.weight_format")) is not None:
        if stored.whole(layout).any():
            raise stored.rejected(layout, "says that rows are tiled, which this version does not read: expected 0")
        parts.append(layout.name)
    return Group(stored.logical(codes, codes.name, codes.shape, matrix.dtype), tuple(parts), matrix)

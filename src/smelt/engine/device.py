"""Where the map pass computes: compiled kernels on the CPU, or torch on a GPU. The bits are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import MissingExtra, OperationFailed, UsageError, show
from ..kernels import random
from ..kernels.dtypes import DTYPES, narrowed
from ..kernels.launch import BAD_INPUT, pieces, run_map
from ..kernels.program import Call, Copy, Draw, Mask, Operand, Step
from ..methods.tensors import identity
from .tiles import Tile

Policy = Literal["error", "warn", "allow"]
#: (output tensor, what it is made of, its dtype, tile, out): fill ``out``.
Mapper = Callable[[str, Call | Copy, str, Tile, npt.NDArray[Any]], None]


def mapper_for(device: str, policy: Policy, warn: Callable[[str], None]) -> Mapper:
    """The map pass on ``device`` ("cpu", "cuda", "cuda:1"); non-finite values are treated by ``policy``."""
    run = run_map if device == "cpu" else _torch_runner(device)

    def mapper(name: str, output: Call | Copy, dtype: str, tile: Tile, out: npt.NDArray[Any]) -> None:
        call = Call(identity, {"x": output.operand}) if isinstance(output, Copy) else output
        if isinstance(output, Copy) and output.operand.dtype == dtype:
            flags = _copy(output.operand, tile, out)
        else:
            flags = run(call, dtype, tile, tile.start, out)
        if flags and policy != "allow":
            message = _describe(name, call, dtype, tile, out, flags)
            if policy == "error":
                raise OperationFailed(message)
            warn(message)

    return mapper


def _copy(operand: Operand, tile: Tile, out: npt.NDArray[Any]) -> int:
    """The stored bits as they are."""
    out[:] = tile(operand)
    return BAD_INPUT if nonfinite(out, operand.dtype).any() else 0


def _describe(name: str, call: Call, dtype: str, tile: Tile, out: npt.NDArray[Any], flags: int) -> str:
    """Which tensor of which model is not finite, how often, and where: as far as this tile shows."""
    if flags & BAD_INPUT:
        for operand in call.operands():
            bad = nonfinite(tile(operand), operand.dtype)
            if bad.any():
                count, where = _counted(bad, tile, call)
                return f"{getattr(operand, 'label', 'input')}: tensor {show(name)} holds {count} NaN or Inf, {where}"
    count, where = _counted(nonfinite(out, dtype), tile, call)
    kind = DTYPES[dtype].value_type
    advice = "weights too large, or choose a wider out_dtype"
    return f"tensor {show(name)}: {count} results are NaN or Inf in {kind}, {where}: {advice}"


def _counted(bad: npt.NDArray[np.bool_], tile: Tile, call: Call) -> tuple[str, str]:
    """How many elements, and where the first is; of a tensor of several tiles only what is known."""
    whole, first = tile.count == call.count, tile.start + int(bad.argmax())
    return ("" if whole else "at least ") + str(int(bad.sum())), f"{'the first' if whole else 'one'} at element {first}"


def nonfinite(stored: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.bool_]:
    """Where stored values are NaN or Inf; nowhere for types that have none."""
    mask = DTYPES[dtype].exponent_mask
    if not mask:
        return np.zeros(stored.shape, np.bool_)
    bits = stored.view(f"u{stored.dtype.itemsize}")
    wanted = bits.dtype.type(mask)
    return np.asarray((bits & wanted) == wanted)


def _torch_runner(device: str) -> Callable[..., int]:
    """The same call on a torch device, element formulas run as they are."""
    try:
        import torch
    except ImportError:
        raise MissingExtra(f"--device {device}", "torch") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error

    def run(call: Call, dtype: str, tile: Tile, start: int, out: npt.NDArray[Any]) -> int:
        return run_on_torch(call, dtype, tile, start, out, device)

    return run


def run_on_torch(
    call: Call, dtype: str, arrays: Callable[[Operand], Any], start: int, out: npt.NDArray[Any], device: str
) -> int:
    """Compute elements start .. start + len(out) into ``out`` on a torch device; flags as ``run_map``."""
    flags = 0
    for first, last in pieces(call, start, len(out)):
        bound = {
            name: _bound(value, arrays, start, first, last, call, device) for name, value in call.arguments.items()
        }
        flags |= _run_piece(call, dtype, bound, out[first:last])
    for operand in call.operands():
        flags |= BAD_INPUT if nonfinite(arrays(operand), operand.dtype).any() else 0
    return flags


def _run_piece(call: Call, dtype: str, bound: dict[str, Any], out: npt.NDArray[Any]) -> int:
    import torch

    from ..kernels.arrays import apply
    from ..kernels.launch import BAD_OUTPUT

    result = apply(call.formula, bound)
    if result.dtype is torch.float64 and dtype in ("BF16", "F16"):
        result = torch.from_numpy(narrowed(result.cpu().numpy()))
    stored = result.to(getattr(torch, DTYPES[dtype].value_type)).cpu()
    bits = stored.view(torch.uint16) if DTYPES[dtype].storage is np.uint16 else stored
    out[:] = bits.numpy()
    bad = nonfinite(out, dtype)
    _canonical(out, dtype)
    return BAD_OUTPUT if bad.any() else 0


def _canonical(out: npt.NDArray[Any], dtype: str) -> None:
    """One NaN, as the compiled kernels store it."""
    values = DTYPES[dtype].as_values(out)
    nan = values != values
    if nan.any():
        values[nan] = np.array(np.nan).astype(values.dtype)


def _bound(value: Any, arrays: Any, start: int, first: int, last: int, call: Call, device: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_bound(item, arrays, start, first, last, call, device) for item in value)
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Step):
        return value.before if start + first < value.cut else value.after
    return _tensor(value, arrays, start, first, last, call, device)


def _tensor(value: Any, arrays: Any, start: int, first: int, last: int, call: Call, device: str) -> Any:
    import torch

    from ..kernels.generate import precision_of

    if isinstance(value, Draw):
        words = random.words(value.key, start + first, last - first, torch.empty(0, device=device))
        one = value.threshold is not None
        density = value.density if one else torch.from_numpy(arrays(value.density)[first:last]).to(device)
        return random.drawn(words, density)
    if isinstance(value, Mask):
        return torch.from_numpy(arrays(value.operand)[first:last] != 0).to(device)
    stored = torch.from_numpy(np.ascontiguousarray(arrays(value)[first:last]))
    typed = stored.view(getattr(torch, DTYPES[value.dtype].value_type)).to(device)
    return typed.to(getattr(torch, precision_of(call)))

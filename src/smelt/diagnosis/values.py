"""The values that one tensor holds: range, mean magnitude, zeros, numbers that are none."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint import Checkpoint
from ..engine.backbone import as_floats
from ..engine.progress import Progress
from ..engine.tiles import TILE
from ..kernels.dtypes import DTYPES


@dataclass
class Values:
    """``lowest``, ``highest`` and ``mean_magnitude`` are of the finite values; None without any."""

    lowest: float | None = None
    highest: float | None = None
    mean_magnitude: float | None = None
    zeros: int = 0
    nonfinite: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def readable(code: str) -> bool:
    """Whether single values of the dtype can be told: not the packed types below one byte, nor complex."""
    return DTYPES[code].bits >= 8 and code != "C64"


def values_of(checkpoint: Checkpoint, name: str, progress: Progress) -> Values:
    """Go through one tensor, a megabyte or so at a time."""
    info = checkpoint.tensors[name]
    result, total, finite = Values(), 0.0, 0
    buffer = np.empty(min(TILE, info.count), DTYPES[info.dtype].storage)
    for start in range(0, info.count, TILE):
        part = buffer[: min(TILE, info.count - start)]
        checkpoint.read(name, start, part)
        numbers = _numbers(part, info.dtype)
        good = numbers[np.isfinite(numbers)]
        result.nonfinite += len(numbers) - len(good)
        result.zeros += len(good) - int(np.count_nonzero(good))
        if len(good):
            _widen(result, float(good.min()), float(good.max()))
        total, finite = total + float(np.abs(good).sum(dtype=np.float64)), finite + len(good)
        progress.advance(part.nbytes)
    result.mean_magnitude = total / finite if finite else None
    return result


def _numbers(stored: npt.NDArray[Any], code: str) -> npt.NDArray[Any]:
    """Floats as floats; integers as fp64, which is exact up to 2^53."""
    if DTYPES[code].floating:
        return as_floats(stored, code)
    return DTYPES[code].as_values(stored).astype(np.float64)


def _widen(values: Values, low: float, high: float) -> None:
    values.lowest = low if values.lowest is None else min(values.lowest, low)
    values.highest = high if values.highest is None else max(values.highest, high)

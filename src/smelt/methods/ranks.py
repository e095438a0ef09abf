"""Ranks of magnitudes inside a row, as functions of whole rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def ranks(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The 0-based rank of each |value| along the last axis, ascending; of equal magnitudes the first is lower."""
    order = _order(values)
    found = np.empty_like(order)
    np.put_along_axis(found, order, np.broadcast_to(np.arange(order.shape[-1]), order.shape), axis=-1)
    return found


def _order(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The stable sorting order: with magnitude bits and place in one integer, any sort is stable, and faster."""
    if values.dtype != np.float32:
        return np.argsort(np.abs(values), axis=-1, kind="stable")
    keys = (np.abs(values).view(np.uint32).astype(np.uint64) << np.uint64(32)) | np.arange(
        values.shape[-1], dtype=np.uint64
    )
    keys.sort(axis=-1)
    return np.asarray((keys & np.uint64(0xFFFFFFFF)).view(np.int64))

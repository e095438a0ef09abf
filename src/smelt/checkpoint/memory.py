"""Dicts of arrays as checkpoints: numpy (with ml_dtypes) and torch, without a copy where possible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import InputRejected, show
from ..kernels.dtypes import DTYPES, code_of
from .base import Checkpoint, TensorInfo


class MemoryCheckpoint(Checkpoint):
    """Named arrays in memory. ``kind`` tells which library they came from."""

    def __init__(self, arrays: Mapping[str, Any], label: str) -> None:
        self.label = label
        self.config: Mapping[str, Any] = {}
        self.metadata: Mapping[str, str] = {}
        self.kind: Literal["numpy", "torch"] = "numpy"
        self._stored: dict[str, npt.NDArray[Any]] = {}
        tensors = {}
        for name in sorted(arrays):
            values = self._values(name, arrays[name])
            code = _code(name, values)
            self._stored[name] = DTYPES[code].as_storage(np.ascontiguousarray(values).reshape(-1))
            tensors[name] = TensorInfo(name, code, values.shape)
        self.tensors: Mapping[str, TensorInfo] = tensors

    def _values(self, name: str, array: Any) -> npt.NDArray[Any]:
        if type(array).__module__.partition(".")[0] == "torch":
            self.kind = "torch"
            return _from_torch(array)
        if isinstance(array, np.ndarray | np.generic):
            return np.asarray(array)
        raise InputRejected(f"{self.label}: {show(name)} is a {type(array).__name__}, expected a numpy or torch array")

    def read(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        out[:] = self._stored[name][start : start + len(out)]

    def check_unchanged(self) -> None:
        """Arrays in memory belong to the caller."""


def _code(name: str, values: npt.NDArray[Any]) -> str:
    try:
        return code_of(values.dtype)
    except KeyError:
        raise InputRejected(f"tensor {show(name)} has dtype {values.dtype}, which checkpoints cannot hold") from None


def _from_torch(tensor: Any) -> npt.NDArray[Any]:
    """The tensor's values as numpy; bfloat16 and 8-bit floats by their bits."""
    import torch

    plain = tensor.detach().cpu().contiguous()
    name = str(plain.dtype).removeprefix("torch.")
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"):
        bits = plain.view(torch.uint16 if name == "bfloat16" else torch.uint8).numpy()
        return bits.view(next(row.values for row in DTYPES.values() if row.value_type == name))
    return plain.numpy()  # type: ignore[no-any-return]

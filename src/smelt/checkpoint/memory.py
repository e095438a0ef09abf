"""Dicts of arrays as checkpoints: numpy (with ml_dtypes) and torch, without a copy where possible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import InputRejected, show
from ..kernels.dtypes import DTYPES, code_of
from .base import Checkpoint, TensorInfo
from .safetensors import name_problem

Kind = Literal["numpy", "torch"]


class MemoryCheckpoint(Checkpoint):
    """Named arrays in memory. ``kind`` tells which library they came from ("torch" if any of them did).

    Raises InputRejected for names that no file can hold, for values that are no arrays, and for dtypes that
    the file format does not have. Tensors on other devices are copied to the CPU piece by piece.
    """

    def __init__(self, arrays: Mapping[str, Any], label: str = "arrays") -> None:
        self.label = label
        self.kind: Kind = "torch" if any(_is_torch(array) for array in arrays.values()) else "numpy"
        self._flat: dict[str, Any] = {}
        tensors = {}
        for name in sorted(arrays, key=str):
            subject = f"{label}: tensor {show(name)}"
            if problem := name_problem(name) if isinstance(name, str) else "is no text":
                raise InputRejected(f"{subject}: the name {problem}")
            code, shape, self._flat[name] = _flattened(arrays[name], subject)
            tensors[name] = TensorInfo(name, code, shape)
        self.tensors: Mapping[str, TensorInfo] = tensors

    def read(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        part = self._flat[name][start : start + len(out)]
        if start < 0 or len(part) != len(out):
            raise ValueError(f"items {start} to {start + len(out)} of {self.tensors[name]} are outside of the tensor")
        out[:] = (_bits(part) if _is_torch(part) else part).view(out.dtype)

    def read_runs(self, name: str, starts: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        """Those that are equally far apart are columns of a matrix, but for the last."""
        flat, steps = self._flat[name], np.diff(starts)
        if not len(steps) or steps[0] < out.shape[1] or (steps != steps[0]).any() or starts[0] < 0 or _is_torch(flat):
            super().read_runs(name, starts, out)
            return
        self.read(name, int(starts[-1]), out[-1])
        out[:-1] = flat.view(out.dtype)[starts[0] : starts[-1]].reshape(-1, steps[0])[:, : out.shape[1]]

    def check_unchanged(self) -> None:
        """Arrays in memory belong to the caller."""


def of_module(module: Any, label: str) -> MemoryCheckpoint:
    """A live model's ``state_dict()``, and its config where it is one of transformers'."""
    checkpoint = MemoryCheckpoint(module.state_dict(), label)
    describe = getattr(getattr(module, "config", None), "to_dict", None)
    checkpoint.config = describe() if callable(describe) else {}
    return checkpoint


def _is_torch(array: object) -> bool:
    """Whether it is a torch tensor, told without importing torch."""
    return any(kind.__module__ == "torch" and kind.__name__ == "Tensor" for kind in type(array).__mro__)


def _flattened(array: Any, subject: str) -> tuple[str, tuple[int, ...], Any]:
    """Code, shape and the same values as one contiguous line, in the library they came in."""
    if _is_torch(array):
        return _flattened_torch(array, subject)
    if not isinstance(array, np.ndarray | np.generic):
        raise InputRejected(f"{subject} is a {type(array).__name__}, expected a numpy or torch array")
    values = np.asarray(array)
    code = _code(values.dtype, subject)
    native = np.ascontiguousarray(values, values.dtype.newbyteorder("=")).reshape(-1)
    return code, values.shape, native


def _code(dtype: Any, subject: str) -> str:
    """The format's code for a numpy dtype."""
    try:
        return code_of(dtype)
    except KeyError:
        raise InputRejected(f"{subject} has dtype {dtype}, which checkpoints cannot hold") from None


def _flattened_torch(tensor: Any, subject: str) -> tuple[str, tuple[int, ...], Any]:
    import torch

    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        raise InputRejected(f"{subject} is a sparse, quantised or meta tensor, expected plain values")
    name = str(tensor.dtype).removeprefix("torch.")
    code = next((row.code for row in DTYPES.values() if row.value_type == name and row.bits >= 8), None)
    if code is None:
        raise InputRejected(f"{subject} has dtype {name}, which checkpoints cannot hold")
    return code, tuple(tensor.shape), tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)


def _bits(part: Any) -> npt.NDArray[Any]:
    """The bits of a contiguous torch tensor; numpy does not know all of torch's dtypes, but all their sizes."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits: npt.NDArray[Any] = part.cpu().view(integers[part.element_size()]).numpy()
    return bits

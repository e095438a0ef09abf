"""What is stored, as the schemes go through it: every tensor is taken by one of them, dropped, or plain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import InputRejected, show
from ...kernels.dtypes import DTYPES, NAMES
from ..base import Checkpoint, TensorInfo


class Reader(Protocol):
    """Reads a logical tensor."""

    def read(self, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` (1-D, storage type of the logical dtype) with elements from ``start`` on."""


@dataclass(frozen=True)
class Group:
    """One logical tensor: what it is called and looks like, which stored tensors it takes, and how it is read."""

    info: TensorInfo
    parts: tuple[str, ...]
    reader: Reader


class Stored:
    """The stored tensors of a checkpoint that may be quantised, and what is said of them in messages."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.tensors = checkpoint.tensors

    def ending(self, *endings: str) -> Iterator[tuple[str, TensorInfo]]:
        """(what precedes the ending, tensor) for every tensor whose name ends so."""
        for name, info in self.tensors.items():
            for ending in endings:
                if name.endswith(ending):
                    yield name.removesuffix(ending), info

    def partner(self, owner: TensorInfo, name: str, *dtypes: str) -> TensorInfo:
        """A tensor without which ``owner`` means nothing. InputRejected when it is missing or of another dtype."""
        if name not in self.tensors:
            raise self.rejected(owner, f"is quantised, and its {show(name)} is missing: download the model again")
        info = self.tensors[name]
        if dtypes and info.dtype not in dtypes:
            raise self.rejected(info, f"is {info.dtype}, expected {' or '.join(dtypes)}")
        return info

    def of_shape(self, info: TensorInfo, *shapes: tuple[int, ...]) -> TensorInfo:
        """The tensor. InputRejected when it has none of these shapes."""
        if info.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise self.rejected(info, f"has shape {list(info.shape)}, expected {wanted}")
        return info

    def rejected(self, info: TensorInfo, problem: str) -> InputRejected:
        where = f" in {show(info.file)}" if info.file else ""
        return InputRejected(f"{self.checkpoint.label}: tensor {show(info.name)}{where} {problem}")

    def whole(self, info: TensorInfo) -> npt.NDArray[Any]:
        """A small tensor as values."""
        return self.checkpoint[info.name]

    def plain_dtype(self) -> str:
        """The dtype that config.json gives to the model's weights, else BF16."""
        text = self.checkpoint.config.get("text_config")
        for section in (self.checkpoint.config, text if isinstance(text, Mapping) else {}):
            named = section.get("dtype", section.get("torch_dtype"))
            if isinstance(named, str) and NAMES.get(named) in ("BF16", "F16", "F32"):
                return NAMES[named]
        return "BF16"

    def logical(self, codes: TensorInfo, name: str, shape: tuple[int, ...], dtype: str) -> TensorInfo:
        """A logical tensor, which lies where its codes lie."""
        if name != codes.name and name in self.tensors:
            raise self.rejected(codes, f"is quantised, and {show(name)} is there too: remove one of them")
        return TensorInfo(name, dtype, shape, codes.file, codes.offset)


def values_of_codes(dtype: str) -> npt.NDArray[np.float32]:
    """The values of the 256 codes of an 8-bit dtype."""
    with np.errstate(invalid="ignore"):
        return np.arange(256, dtype=np.uint8).view(DTYPES[dtype].values).astype(np.float32)


def matrices(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the matrices that a tensor of this shape is made of."""
    return (shape[-2] if len(shape) > 1 else 1), (shape[-1] if shape else 1)

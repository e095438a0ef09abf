"""Tensors that are put together from stretches of tensors in several files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import numpy.typing as npt

from ..checkpoint import Checkpoint, TensorInfo
from ..checkpoint.torch_file import StoredTensor, TorchFile
from ..errors import InputRejected, show
from ..storage import FileIdentity


@dataclass(frozen=True)
class Stretch:
    """Elements ``start`` .. ``start + count`` of a stored tensor."""

    tensor: StoredTensor
    start: int
    count: int


class Ribbon:
    """Stored tensors laid end to end, as one line of elements."""

    def __init__(self, tensors: Iterable[StoredTensor]) -> None:
        self._tensors = tuple(tensors)
        self._ends = [0, *accumulate(tensor.count for tensor in self._tensors)]
        self.count = self._ends[-1]

    def cut(self, start: int, count: int) -> list[Stretch]:
        """Elements ``start`` .. ``start + count``. ValueError when there are not so many."""
        if start + count > self.count:
            raise ValueError(f"element {start + count} is wanted, there are {self.count}")
        found = []
        for tensor, first in zip(self._tensors, self._ends[:-1], strict=True):
            low, high = max(start, first), min(start + count, first + tensor.count)
            if low < high:
                found.append(Stretch(tensor, low - first, high - low))
        return found


class AssembledCheckpoint(Checkpoint):
    """``tensors``: name -> (shape, its elements in order). All stretches of a tensor have one dtype."""

    def __init__(
        self, label: str, tensors: Mapping[str, tuple[tuple[int, ...], Sequence[Stretch]]], files: Sequence[TorchFile],
        metadata: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.label = label
        self.metadata = metadata
        self._files = tuple(files)
        self._stretches = {name: tuple(stretches) for name, (_, stretches) in tensors.items()}
        self.tensors = {
            name: TensorInfo(name, _dtype(name, stretches), shape)
            for name, (shape, stretches) in sorted(tensors.items())
        }

    def read(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        if start < 0 or start + len(out) > prod(self.tensors[name].shape):
            raise ValueError(f"items {start} to {start + len(out)} are outside of {name}")
        first = 0
        for stretch in self._stretches[name]:
            low, high = max(start, first), min(start + len(out), first + stretch.count)
            if low < high:
                stretch.tensor.read(stretch.start + low - first, out[low - start : high - start])
            first += stretch.count

    def check_unchanged(self) -> None:
        for file in self._files:
            file.check_unchanged()

    def files(self) -> list[FileIdentity]:
        return sorted((file.identity for file in self._files), key=lambda file: file.path.name)

    def close(self) -> None:
        for file in self._files:
            file.close()


def _dtype(name: str, stretches: Sequence[Stretch]) -> str:
    codes = {stretch.tensor.dtype for stretch in stretches}
    if len(codes) > 1:
        raise InputRejected(f"tensor {show(name)} is stored in parts of several types: {', '.join(sorted(codes))}")
    return codes.pop() if codes else "F32"

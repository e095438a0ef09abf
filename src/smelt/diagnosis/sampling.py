"""Which elements of each tensor are looked at, and reading them from several checkpoints at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..checkpoint import Checkpoint, TensorInfo
from ..engine.backbone import as_floats
from ..errors import UsageError
from ..kernels.dtypes import DTYPES

Sample = Literal["auto", "full"] | float

_RUN, _CHUNK = 1 << 14, 1 << 16  # elements read at a time: of a sample, of everything
_READ_WHOLE, _AUTO = 1 << 25, 1 << 24  # elements per model


@dataclass(frozen=True)
class Sampling:
    """How many elements of a tensor to read: all, a share, or at most so many."""

    share: float = 1.0
    most: int | None = None

    @classmethod
    def of(cls, sample: Sample, tensors: Sequence[TensorInfo]) -> Sampling:
        """``auto`` reads models up to 33 million parameters whole, of larger ones about 17 million elements.

        Raises UsageError when ``sample`` is neither a word known nor a share in (0, 1].
        """
        if sample == "full":
            return cls()
        if sample == "auto":
            small = sum(info.count for info in tensors) <= _READ_WHOLE
            return cls() if small else cls(most=max(_RUN, _AUTO // len(tensors)))
        if isinstance(sample, str) or not 0 < sample <= 1:
            raise UsageError(f"sample must be auto, full or a share in (0, 1], not {sample!r}")
        return cls(share=float(sample))

    def runs(self, count: int) -> list[tuple[int, int]]:
        """(start, length) of what is read of ``count`` elements: evenly spread, never overlapping."""
        wanted = min(count, max(_RUN, round(count * self.share)))
        wanted = wanted if self.most is None else min(wanted, self.most)
        if wanted == count:
            return [(start, min(_CHUNK, count - start)) for start in range(0, count, _CHUNK)]
        pieces = wanted // _RUN
        return [(index * (count - _RUN) // max(1, pieces - 1), _RUN) for index in range(pieces)]

    def elements(self, count: int) -> int:
        """How many of ``count`` elements are read."""
        return sum(length for _, length in self.runs(count))


def read_rows(checkpoints: Sequence[Checkpoint], name: str, sampling: Sampling) -> Iterator[list[npt.NDArray[Any]]]:
    """The elements to look at of tensor ``name``, as numbers, up to 65 536 at a time: one array each."""
    runs = sampling.runs(checkpoints[0].tensors[name].count)
    at_once = max(1, _CHUNK // runs[0][1]) if runs else 1
    for first in range(0, len(runs), at_once):
        batch = runs[first : first + at_once]
        yield [_read(checkpoint, name, batch) for checkpoint in checkpoints]


def _read(checkpoint: Checkpoint, name: str, runs: Sequence[tuple[int, int]]) -> npt.NDArray[Any]:
    code = checkpoint.tensors[name].dtype
    stored = np.empty(sum(length for _, length in runs), DTYPES[code].storage)
    done = 0
    for start, length in runs:
        checkpoint.read(name, start, stored[done : done + length])
        done += length
    return as_floats(stored, code)

"""What every weight source offers: named tensors, read piece by piece.

A new file format is one file beside this one that subclasses :class:`Checkpoint`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..kernels.dtypes import DTYPES
from ..storage import FileIdentity as FileIdentity
from .place import LocalPlace
from .side import SideFiles


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header states it; nothing has been read.

    ``dtype`` is the safetensors code ("BF16", "F32", "I64", ...), ``file`` and ``offset`` tell where the
    first byte lies (an empty file name for tensors in memory) and serve only to read in disk order.
    ``native`` is the dtype that outputs take after it: another one where values are computed when they are read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""
    offset: int = 0
    native: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "native", self.native or self.dtype)

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * DTYPES[self.dtype].bits // 8


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a checkpoint's tensors and how its files are called: a folder of its own, and the stem of its files.

    They are the tensors whose names begin with ``prefix``, which the files leave out.
    """

    folder: str = ""
    stem: str = "model"

    @property
    def prefix(self) -> str:
        return f"{self.folder}." if self.folder else ""

    def inside(self, name: str) -> str:
        """The path of a file of this part, seen from the checkpoint's folder."""
        return f"{self.folder}/{name}" if self.folder else name


@dataclass(frozen=True, slots=True)
class Factors:
    """A change of low rank to a tensor seen as a matrix (its first axis by the rest): ``scaling * left @ right``.

    left: (rows, r), right: (r, columns), float32; r is 0 for a tensor that is known not to change.
    """

    left: npt.NDArray[np.float32]
    right: npt.NDArray[np.float32]
    scaling: float


class Checkpoint(ABC, Mapping[str, npt.NDArray[Any]]):
    """Named tensors. As a mapping it is lazy: ``checkpoint[name]`` reads one whole tensor.

    Attributes
    ----------
    label: what to call it in messages and cards (as the user wrote it; never an absolute path in outputs).
    tensors: name -> :class:`TensorInfo`, sorted by name.
    config: the parsed ``config.json``, or an empty dict when there is none.
    folder: the local directory with its side files (tokenizer, config, ...), or None.
    revision: the hub commit hash the label was resolved to, or None.
    metadata: the ``__metadata__`` strings of the file(s), merged.
    notices: what is worth a warning but no refusal.
    parts: how weight files are called, folder by folder; most models are of one part.
    beside: side files that a copy needs beyond the well-known ones.
    scratch: bytes of memory that reading takes beside what it fills, however many checkpoints do.
    held: bytes of memory that it keeps for itself while it is read.
    """

    label: str
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] = MappingProxyType({})
    metadata: Mapping[str, str] = MappingProxyType({})
    notices: Sequence[str] = ()
    parts: Sequence[Part] = (Part(),)
    beside: Sequence[str] = ()
    folder: Path | None = None
    revision: str | None = None
    scratch: int = 0
    held: int = 0

    @property
    def side_files(self) -> Mapping[str, bytes]:
        """The files beside the weights by name, each read when it is asked for."""
        return SideFiles(LocalPlace(self.folder) if self.folder is not None else None)

    @property
    def unwritten(self) -> Sequence[str]:
        """What a copy in another format lacks, as notices."""
        return ()

    def strip(self) -> None:
        """Forget all but the tensors."""
        self.folder, self.config, self.parts, self.beside = None, {}, (Part(),), ()

    @abstractmethod
    def read(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` (1-D, the dtype's storage type, C-contiguous) with elements start..start+len(out).

        Storage types are in ``kernels.dtypes.DTYPES``: BF16 and F16 are uint16, F32 float32, and so on. Types
        of less than a byte are read packed, as bytes, which ``start`` then counts.
        Thread-safe. Raises OperationFailed on an I/O error or a short file (names file, tensor, offset).
        """

    def read_runs(self, name: str, starts: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        """Fill the rows of ``out`` (2-D, C-contiguous), each with elements from its start on. As :meth:`read`."""
        for start, row in zip(starts.tolist(), out, strict=True):
            self.read(name, start, row)

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raise OperationFailed when an input file is no longer what it was when it was opened."""

    def rank(self, name: str, base: Checkpoint) -> int | None:
        """How many directions ``factors`` gives a tensor's change of that of ``base``, at most; nothing is read.

        None where it has none, or is read with another base.
        """
        return None

    def factors(self, name: str) -> Factors | None:
        """How a tensor differs from that of the base it is read with, where that is known to be of low rank."""
        return None

    def files(self) -> list[FileIdentity]:
        """The weight files behind this checkpoint, sorted by name; empty for tensors in memory."""
        return []

    def folders(self) -> list[Path]:
        """The local directories that it is read from: no output may lie in them."""
        return [] if self.folder is None else [self.folder]

    def close(self) -> None:
        """Release file descriptors. Further reads fail."""

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        info = self.tensors[name]
        dtype = DTYPES[info.dtype]
        flat = np.empty(info.nbytes // np.dtype(dtype.storage).itemsize, dtype.storage)
        self.read(name, 0, flat)
        return dtype.as_values(flat).reshape(info.shape) if dtype.bits >= 8 else flat

    def __contains__(self, name: object) -> bool:
        return name in self.tensors  # the inherited test would read the tensor

    # By identity: the inherited comparison would read every tensor.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class OpenFile(Protocol):
    """A file that tensors are read from."""

    @property
    def identity(self) -> FileIdentity: ...
    def check_unchanged(self) -> None: ...
    def close(self) -> None: ...


class OpenFiles(Checkpoint):
    """A checkpoint that holds its files open, by name."""

    _files: Mapping[str, OpenFile]

    def check_unchanged(self) -> None:
        for file in self._files.values():
            file.check_unchanged()

    def files(self) -> list[FileIdentity]:
        return [self._files[name].identity for name in sorted(self._files)]

    def close(self) -> None:
        for file in self._files.values():
            file.close()

"""Files of torch.save read without torch, and without running what is pickled in them.

Such a file is a zip of one pickle and one record of raw bytes per storage. The pickle may name callables:
those of a short list are known, other objects of the listed packages become inert stand-ins that keep
nothing, and any other name is refused. Tensors stay on the disk; they are read by position.
"""

from __future__ import annotations

import pickle
import struct
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy.typing as npt

from .. import storage
from ..errors import InputRejected, OperationFailed, show
from ..kernels.dtypes import DTYPES

#: Bytes of a pickle: names and shapes of a hundred thousand tensors stay far below.
MAX_PICKLE = 256 << 20

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip

#: Packages whose objects are left aside.
_LEFT_ASIDE = {"torch", "deepspeed", "numpy", "argparse", "transformers", "accelerate"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its elements lie one after another from ``offset`` (in bytes) on."""

    file: TorchFile
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def count(self) -> int:
        return prod(self.shape)

    def read(self, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` (storage type) with elements from ``start`` on."""
        self.file.pread(out.data, self.offset + start * out.itemsize)


class Inert:
    """Stands for an object of a class that is not loaded."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class TorchFile:
    """One open file; ``content`` is what was saved, each tensor in it a :class:`StoredTensor`.

    Raises InputRejected when the file is not of this kind, malformed, or names callables that are not known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = storage.open_read(path)
        self._closing = weakref.finalize(self, storage.close, self._descriptor)
        self.identity = storage.identity(path, self._descriptor)
        try:
            self._records = self._directory()
            self.content = self._unpickled()
        except (zipfile.BadZipFile, pickle.UnpicklingError, ValueError, TypeError, KeyError, AttributeError,
                IndexError, EOFError, RecursionError, struct.error) as error:  # fmt: skip
            self.close()
            raise InputRejected(f"{storage.shown(path)} is not a whole file of torch.save: {error}") from error
        except BaseException:
            self.close()
            raise

    def pread(self, out: memoryview, offset: int) -> None:
        storage.pread_into(self._descriptor, out, offset, self.path)

    def check_unchanged(self) -> None:
        if storage.identity(self.path) != self.identity:
            raise OperationFailed(f"{storage.shown(self.path)} changed while it was being read: run again")

    def close(self) -> None:
        self._closing()

    # --- the zip --------------------------------------------------------------------------------------------

    def _directory(self) -> dict[str, tuple[int, int]]:
        """Record -> (first byte, size), names without the leading folder. Only stored records can be read in place."""
        with zipfile.ZipFile(storage.stretch(self._descriptor, self.path, 0, self.identity.size)) as archive:
            entries = archive.infolist()
        records = {}
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(f"record {show(entry.filename)} is compressed")
            start = self._start(entry)
            if start + entry.file_size > self.identity.size:
                raise ValueError(f"record {show(entry.filename)} lies beyond the end")
            records[entry.filename.partition("/")[2]] = start, entry.file_size
        return records

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """The first byte of a record, behind its own header."""
        header = bytearray(30)
        if not 0 <= entry.header_offset <= self.identity.size - len(header):
            raise ValueError(f"record {show(entry.filename)} lies outside of the file")
        self.pread(memoryview(header), entry.header_offset)
        name, extra = struct.unpack("<HH", header[26:30])
        return entry.header_offset + 30 + int(name) + int(extra)

    # --- the pickle -----------------------------------------------------------------------------------------

    def _unpickled(self) -> Any:
        if "byteorder" in self._records and self._record("byteorder").read() != b"little":
            raise ValueError("it was written on a big-endian machine")
        return _Unpickler(self, self._record("data.pkl")).load()

    def _record(self, name: str) -> IO[bytes]:
        start, size = self._records[name]
        if size > MAX_PICKLE:
            raise ValueError(f"record {show(name)} has {size} bytes, at most {MAX_PICKLE} are accepted")
        return storage.stretch(self._descriptor, self.path, start, size)

    def tensor(self, pid: Any, offset: int, shape: Any, stride: Any) -> StoredTensor:
        """A tensor on the storage that ``pid`` names, checked against the size of its record."""
        _, dtype, key, _, _ = pid
        found = tuple(int(size) for size in shape)
        if min(found, default=0) < 0 or offset < 0:
            raise ValueError("a tensor has a negative size")
        if prod(found) > 1 and tuple(stride) != _contiguous(found):
            raise ValueError(f"a tensor of shape {list(found)} has strides {list(stride)}, expected rows in order")
        size = DTYPES[dtype].bits // 8
        start, length = self._records[f"data/{key}"]
        if (offset + prod(found)) * size > length:
            raise ValueError(f"a tensor of shape {list(found)} exceeds record data/{key}")
        return StoredTensor(self, dtype, found, start + offset * size)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[place + 1 :]) for place in range(len(shape)))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: TorchFile, data: IO[bytes]) -> None:
        super().__init__(data)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name in the pickle; never the thing itself, but for containers."""
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("builtins", "set"): set,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *more: data,
        }
        if (module, name) in known:
            return known[module, name]
        if module.partition(".")[0] in _LEFT_ASIDE:
            return Inert
        raise InputRejected(
            f"{storage.shown(self._file.path)} names {show(f'{module}.{name}')}, which no optimizer needs: refused, it "
            "may be an attack"
        )

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def _tensor(self, pid: Any, offset: int, shape: Any, stride: Any, *more: Any) -> StoredTensor:
        return self._file.tensor(pid, offset, shape, stride)

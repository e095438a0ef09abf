"""Files of torch.save read without torch, and without running what is pickled in them.

Such a file is a zip of one pickle and one record of raw bytes per storage. The pickle may name callables:
those of a short list are known, other objects of the listed packages become inert stand-ins that keep
nothing, and any other name is refused. Tensors stay on the disk; they are read by position.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import storage
from ..errors import InputRejected, show
from ..kernels.dtypes import DTYPES
from .archive import Record, records_of
from .pickles import Inert, Known, Unpickler
from .stored import LocalFile, Stored

#: Bytes of a pickle: names and shapes of a hundred thousand tensors stay far below.
MAX_PICKLE = 256 << 20

_MAX_RANK = 16

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip

#: torch's names of dtypes, where a tensor states its own.
_TYPES = {row.value_type: row.code for row in DTYPES.values() if row.bits >= 8}

#: Packages whose objects are left aside.
_LEFT_ASIDE = {
    "torch", "deepspeed", "numpy", "argparse", "transformers", "accelerate", "pytorch_lightning", "lightning",
    "omegaconf", "_codecs",
}  # fmt: skip

#: How the files of torch before 1.6 begin: a pickle of the number 0x1950a86a20f9469cfc6c.
_LEGACY = b"\x80\x02\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."

#: How a program of torch.jit, which is saved as a zip of the same kind, gives itself away.
_PROGRAM = "constants.pkl"

#: Where elements do not lie in order: how many are gathered at once, how many bytes between two of them are
#: read along rather than left out, and how many elements one read may span.
_GATHERED, _GAP, _SPAN = 1 << 19, 1024, 1 << 17


@dataclass(frozen=True)
class Code:
    """A dtype that the pickle names."""

    dtype: str


@dataclass(frozen=True)
class Storage:
    """A record as elements of one dtype."""

    record: Record
    dtype: str


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where its first element lies (in bytes), and how many elements lie from one to the next
    along each axis."""

    file: TorchFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    @property
    def count(self) -> int:
        return prod(self.shape)

    def read(self, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` (storage type) with elements from ``start`` on."""
        if _in_order(self.shape, self.strides):
            self.file.pread(out.data, self.offset + start * out.itemsize)
            return
        for first in range(0, len(out), _GATHERED):
            self._gather(start + first, out[first : first + _GATHERED])

    def _gather(self, start: int, out: npt.NDArray[Any]) -> None:
        """Elements that do not lie in order: what lies close together is read at once."""
        indices = np.unravel_index(np.arange(start, start + len(out)), self.shape)
        places = np.zeros(len(out), np.int64)
        for index, stride in zip(indices, self.strides, strict=True):
            places += index * stride
        order = np.argsort(places, kind="stable")
        ordered = places[order]
        cuts = 1 + np.flatnonzero((np.diff(ordered) * out.itemsize > _GAP) | (np.diff(ordered // _SPAN) > 0))
        for part, wanted in zip(np.split(ordered, cuts), np.split(order, cuts), strict=True):
            near = np.empty(int(part[-1] - part[0]) + 1, out.dtype)
            self.file.pread(near.data, self.offset + int(part[0]) * out.itemsize)
            out[wanted] = near[part - part[0]]


def _refuse_legacy(file: Stored) -> None:
    """Say of a file of torch before 1.6, a row of pickles that begins with a magic number, what to do."""
    head = bytearray(min(file.identity.size, len(_LEGACY)))
    file.read_alone(memoryview(head), 0)
    if bytes(head) == _LEGACY:
        raise InputRejected(
            f"{storage.shown(file.name)} is of the format of torch before 1.6: save it again with a current torch, as "
            "torch.save(torch.load(file, weights_only=True), file)"
        )


class TorchFile:
    """One open file; ``content`` is what was saved, each tensor in it a :class:`StoredTensor`.

    Raises InputRejected when the file is not of this kind, malformed, or names callables that are not known.
    """

    def __init__(self, source: Path | Stored) -> None:
        self._file = LocalFile(source) if isinstance(source, Path) else source
        self.identity, self.name = self._file.identity, self._file.name
        try:
            _refuse_legacy(self._file)
            self._records = records_of(self._file)
            self.content = self._unpickled()
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, struct.error) as error:
            self.close()
            said = f"it lacks the record {error}" if isinstance(error, KeyError) else error
            raise InputRejected(f"{storage.shown(self.name)} is not a whole file of torch.save: {said}") from error
        except BaseException:
            self.close()
            raise

    def pread(self, out: memoryview, offset: int) -> None:
        self._file.read_into(out, offset)

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def close(self) -> None:
        self._file.close()

    def _unpickled(self) -> Any:
        if _PROGRAM in self._records:
            raise InputRejected(
                f"{storage.shown(self.name)} is a program of torch.jit, not weights: save its state_dict()"
            )
        if "byteorder" in self._records and self._text("byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")
        start, size = self._records["data.pkl"]
        data = storage.stretch(self._file.read_into, start, size)
        return Unpickler(data, min(size, MAX_PICKLE), self._named, self._stored).load()

    def _text(self, name: str) -> bytes:
        start, size = self._records[name]
        return storage.stretch(self._file.read_into, start, min(size, 64)).read()

    # --- what stands in the pickle ----------------------------------------------------------------------

    def _named(self, module: str, name: str) -> Any:
        """What stands for a name in the pickle; never the thing itself."""
        whole = f"{module}.{name}"
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return Code(_STORAGES[name])
        if module == "torch" and name in _TYPES:
            return Code(_TYPES[name])
        known: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": _mapping,
            "torch.Size": _size,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._typed_tensor,
            "torch._utils._rebuild_parameter": _parameter,
        }
        if whole in known:
            return Known(known[whole])
        if module.partition(".")[0] in _LEFT_ASIDE or whole in ("builtins.set", "__builtin__.set"):
            return Inert(whole)
        raise InputRejected(
            f"{storage.shown(self.name)} names {show(whole)}, which no weights and no optimizer need: refused, it may "
            "be an attack"
        )

    def _stored(self, pid: Any) -> Storage:
        """What a persistent id refers to: a record, which must be as long as the id says."""
        kind, code, key, _, count = pid
        if kind != "storage" or not isinstance(code, Code) or not isinstance(key, str) or type(count) is not int:
            raise TypeError("it refers to a storage of an unknown kind")
        record = self._records[f"data/{key}"]
        if count * DTYPES[code.dtype].bits // 8 > record.size or count < 0:
            raise ValueError(f"a storage of {count} elements exceeds record data/{key}")
        return Storage(record, code.dtype)

    def _tensor(
        self, stored: Any, offset: Any, shape: Any, strides: Any, grad: Any = False, hooks: Any = None,
        metadata: Any = None,
    ) -> StoredTensor:  # fmt: skip
        """A tensor on a storage. What it takes up is checked against the record."""
        if not isinstance(stored, Storage) or type(offset) is not int or offset < 0 or metadata:
            raise TypeError("a tensor lies on no storage, or is a conjugate or negative view")
        shape, strides = _size(shape), _size(strides)
        size = DTYPES[stored.dtype].bits // 8
        if len(strides) != len(shape):
            raise ValueError(f"a tensor of shape {list(shape)} has strides {list(strides)}")
        reach = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if prod(shape) else 0
        if (offset + reach) * size > stored.record.size:
            raise ValueError(f"a tensor of shape {list(shape)} exceeds its record of {stored.record.size} bytes")
        if not _apart(shape, strides):
            raise ValueError(f"a tensor of shape {list(shape)} with strides {list(strides)} repeats its elements")
        return StoredTensor(self, stored.dtype, shape, stored.record.start + offset * size, strides)

    def _typed_tensor(
        self, stored: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, code: Any, metadata: Any = None
    ) -> StoredTensor:
        """A tensor that states its dtype, on a storage of bytes; ``offset`` counts elements."""
        if not isinstance(stored, Storage) or not isinstance(code, Code):
            raise TypeError("a tensor has no storage, or an unknown dtype")
        return self._tensor(Storage(stored.record, code.dtype), offset, shape, strides, metadata=metadata)


def _mapping() -> dict[Any, Any]:
    return {}


def _parameter(data: Any, *more: Any) -> Any:
    return data


def _size(value: Any) -> tuple[int, ...]:
    """A shape or strides as the pickle gives them."""
    if not isinstance(value, tuple) or len(value) > _MAX_RANK or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError("a tensor has a shape or strides that are no short tuple of whole numbers from 0 on")
    return value


def _in_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements lie one after another; the stride of an axis of one does not matter."""
    ends = [prod(shape[place + 1 :]) for place in range(len(shape))]
    return not prod(shape) or all(n == 1 or stride == end for n, stride, end in zip(shape, strides, ends, strict=True))


def _apart(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether no element lies where another one does."""
    reach = 0
    for stride, n in sorted((stride, n) for n, stride in zip(shape, strides, strict=True) if n > 1):
        if stride <= reach:
            return not prod(shape)
        reach += (n - 1) * stride
    return True

"""Our own strict safetensors reader: a header is checked wholly before a data byte is touched.

The file is a little-endian u64 N, N bytes of JSON (tensor name -> dtype, shape, data_offsets; optionally
``__metadata__``, strings to strings), then the data, which the tensors must fill without hole or overlap.
What this reader accepts, the format's reference reader accepts. Beyond that are refused: repeated keys,
empty, overlong and unprintable names, more than 16 dimensions, dimensions that overflow although one of
them is zero, and more than a million tensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import storage
from ..errors import InputRejected, OperationFailed, show
from ..kernels.dtypes import DTYPES
from .base import TensorInfo
from .documents import brief, parse_json
from .stored import LocalFile, Stored

MAX_HEADER = 100_000_000
MAX_TENSORS = 1_000_000
MAX_RANK = 16
MAX_NAME = 4096
_MAX_COUNT = 1 << 63
_FIELDS = {"dtype", "shape", "data_offsets"}

#: What is often saved under this name instead: how it begins, and what to say.
_IMPOSTORS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights: fetch them with git lfs pull"),
    (b"<!doctype html", "is an HTML page, not weights: the download failed, repeat it"),
    (b"<html", "is an HTML page, not weights: the download failed, repeat it"),
    (b"<?xml", "is an XML page, not weights: the download failed, repeat it"),
    (b"pk\x03\x04", "is a zip archive, probably pickled PyTorch weights: convert it to safetensors first"),
    (b"gguf", "is GGUF: name it .gguf"),
)


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says. ``notices`` holds one line per oddity that is no error, without the file's folder."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    notices: tuple[str, ...] = ()


class SafetensorsFile:
    """One open file, its header parsed. ``identity`` is what the file was at that moment."""

    def __init__(self, source: Path | Stored) -> None:
        self._stored = LocalFile(source) if isinstance(source, Path) else source
        self.identity = self._stored.identity
        try:
            raw = _read_header(self._stored)
            self.header = parse_header(
                raw, self.identity.size - 8 - len(raw), self._stored.name, self.identity.path.name
            )
        except BaseException:
            self.close()
            raise

    def read(self, info: TensorInfo, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` (1-D, of the storage type) from its ``start``-th item on. Thread-safe."""
        offset = start * out.itemsize
        if start < 0 or offset + out.nbytes > info.nbytes:
            raise ValueError(f"items {start} to {start + out.size} of {info} are outside of the tensor")
        try:
            self._stored.read_into(out.data, info.offset + offset)
        except OperationFailed as error:
            raise OperationFailed(f"tensor {show(info.name)}: {error}") from error

    def read_runs(self, info: TensorInfo, starts: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        """Fill the rows of ``out`` (2-D), each from its own item on. Thread-safe."""
        length = out.shape[1] * out.itemsize
        offsets = starts * out.itemsize
        if len(starts) and not 0 <= offsets.min() <= offsets.max() <= info.nbytes - length:
            raise ValueError(f"runs of {out.shape[1]} items outside of {info}")
        try:
            self._stored.read_runs(out.data, (offsets + info.offset).tolist())
        except OperationFailed as error:
            raise OperationFailed(f"tensor {show(info.name)}: {error}") from error

    def check_unchanged(self) -> None:
        """Raise OperationFailed when the name no longer leads to the file as it was opened."""
        self._stored.check_unchanged()

    def close(self) -> None:
        """Close the file, once; further reads fail."""
        self._stored.close()


def _read_header(stored: Stored) -> bytes:
    """The header's bytes, without the eight of its length."""
    size = stored.identity.size
    head = bytearray(min(size, 32))
    stored.read_alone(memoryview(head), 0)
    length = struct.unpack("<Q", head[:8])[0] if size >= 8 else 0
    problem = _length_problem(length, size)
    if problem is None and head[8:9] != b"{":
        problem = f"has a header that begins with {bytes(head[8:9])!r}, expected '{{'"
    if problem is not None:
        raise InputRejected(f"{storage.shown(stored.name)} {_impostor(bytes(head)) or problem}")
    raw = bytearray(length)
    stored.read_alone(memoryview(raw), 8)
    return bytes(raw)


def _length_problem(length: int, size: int) -> str | None:
    if size == 0:
        return "is empty: the download failed, repeat it"
    if size < 8:
        return f"is no safetensors file: {size} bytes, the length of the header alone takes 8"
    if length == 0:
        return "is no safetensors file: it states a header of 0 bytes"
    if length > MAX_HEADER:
        return f"is no safetensors file: it states a header of {length} bytes, at most {MAX_HEADER} are accepted"
    if length > size - 8:
        return f"is cut short: it states a header of {length} bytes, {size - 8} are there"
    return None


def _impostor(head: bytes) -> str | None:
    begin = head.lstrip().lower()
    return next((sentence for prefix, sentence in _IMPOSTORS if begin.startswith(prefix)), None)


def parse_header(raw: bytes, data_size: int, file: str, home: str | None = None) -> Header:
    """Check the JSON of a header against the ``data_size`` bytes that follow it.

    ``file`` names the file in messages; ``home``, or its last part, goes into each :class:`TensorInfo`, whose
    ``offset`` counts from the beginning of the file. Raises InputRejected at the first thing that is wrong.
    """
    where = storage.shown(file)
    content = _load(raw, where)
    metadata = _metadata(content.pop("__metadata__", {}), where)
    if len(content) > MAX_TENSORS:
        raise _too_many(where)
    home, begin = home or PurePath(file).name, 8 + len(raw)
    tensors = {}
    notices: list[str] = []
    for name, entry in content.items():
        try:
            dtype, shape, offset = _checked(name, entry, data_size)
            notices += (f"{show(home)}: tensor {show(name)}: {oddity}" for oddity in _unknown(entry))
        except ValueError as error:
            raise InputRejected(f"{where}: tensor {show(name)} {error}") from error
        tensors[name] = TensorInfo(name, dtype, shape, home, begin + offset)
    _check_tiling(tensors.values(), begin, data_size, where)
    return Header(tensors, metadata, tuple(notices))


def _too_many(where: str) -> InputRejected:
    return InputRejected(f"{where}: the header names more than {MAX_TENSORS} tensors")


def _load(raw: bytes, where: str) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise InputRejected(f"{where}: the header begins with {raw[:1]!r}, expected '{{'")
    if raw.count(b'"data_offsets"') > MAX_TENSORS:  # before a million objects are made
        raise _too_many(where)
    return parse_json(raw, f"{where}: the header", parse_int=_integer, parse_constant=_no_constant, halves=True)


def _integer(text: str) -> int | float:
    # Others read numbers beyond 64 bits, and -0, as floats, which no field may hold.
    return int(text) if len(text) < 20 and text != "-0" else float(text)


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def _metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InputRejected(f"{where}: __metadata__ is {brief(value)}, expected an object of strings")
    for key, text in value.items():
        if not isinstance(text, str):
            raise InputRejected(f"{where}: __metadata__ maps {show(key)} to {brief(text)}, expected a string")
        try:
            (key + text).encode()
        except UnicodeEncodeError as error:
            raise InputRejected(f"{where}: __metadata__ holds half a surrogate pair in {show(key)}") from error
    return value


# --- one tensor's entry: each function raises ValueError with the end of a sentence about the tensor ----


def _checked(name: str, entry: Any, data_size: int) -> tuple[str, tuple[int, ...], int]:
    """Dtype, shape, and where in the data the tensor begins."""
    if problem := name_problem(name):
        raise ValueError(f"has a bad name: it {problem}")
    if not isinstance(entry, dict):
        raise ValueError(f"is {brief(entry)}, expected an object")
    if not entry.keys() >= _FIELDS:
        raise ValueError(f"lacks {', '.join(sorted(_FIELDS - entry.keys()))}")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"has the unknown dtype {brief(dtype)}")
    shape = _shape(entry["shape"])
    return dtype, shape, _offset(entry["data_offsets"], _nbytes(dtype, shape), data_size)


def name_problem(name: str) -> str | None:
    """What is wrong with a tensor's name, or None."""
    if not name:
        return "is empty"
    if not name.isprintable():
        return "holds characters that cannot be printed"
    if len(name) * 4 > MAX_NAME and len(name.encode()) > MAX_NAME:
        return f"has {len(name.encode())} bytes, at most {MAX_NAME} are accepted"
    return None


def _naturals(value: Any, field: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise ValueError(f"has {field} {brief(value)}, expected a list of whole numbers from 0 on")
    return tuple(value)


def _shape(value: Any) -> tuple[int, ...]:
    shape = _naturals(value, "shape")
    if len(shape) > MAX_RANK:
        raise ValueError(f"has {len(shape)} dimensions, at most {MAX_RANK} are accepted")
    if prod(size for size in shape if size) >= _MAX_COUNT:
        raise ValueError(f"has shape {list(shape)}, whose product overflows 63 bits")
    return shape


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    bits = prod(shape) * DTYPES[dtype].bits
    if bits % 8:
        raise ValueError(f"is {dtype} of shape {list(shape)}: its {bits} bits do not fill whole bytes")
    return bits // 8


def _offset(value: Any, nbytes: int, data_size: int) -> int:
    offsets = _naturals(value, "data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"has data_offsets {brief(value)}, expected [begin, end]")
    begin, end = offsets
    if end > data_size:
        raise ValueError(f"ends at data byte {end}, the file's data at {data_size}: the file is cut short")
    if end - begin != nbytes:
        raise ValueError(f"takes {end - begin} bytes, expected {nbytes} for its dtype and shape")
    return begin


def _unknown(entry: dict[str, Any]) -> Iterable[str]:
    """A line for every field that the format does not have."""
    if len(entry) == len(_FIELDS):
        return ()
    fields = {key: entry[key] for key in sorted(entry.keys() - _FIELDS)}
    try:  # half a surrogate pair, or a number that overflows, is no JSON to the reference reader
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise ValueError(f"has an unknown field that is not valid JSON: {error}") from error
    return [f"the unknown field {show(key)} is ignored" for key in fields]


# --- the tensors of a file together ---------------------------------------------------------------------


def _check_tiling(tensors: Iterable[TensorInfo], begin: int, data_size: int, where: str) -> None:
    """The tensors must fill the data exactly: no hole, no shared byte, nothing behind the last."""
    position = begin
    for info in sorted(tensors, key=lambda info: (info.offset, info.nbytes)):
        if info.offset != position:
            gap = info.offset - position
            what = f"leaves a hole of {gap} bytes before it" if gap > 0 else f"shares {-gap} bytes with the one before"
            raise InputRejected(f"{where}: tensor {show(info.name)} {what}")
        position += info.nbytes
    if position != begin + data_size:
        rest = begin + data_size - position
        raise InputRejected(f"{where}: {rest} bytes follow the last tensor, expected none")

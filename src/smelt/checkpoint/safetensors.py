"""Our own strict safetensors reader: the header is checked wholly before a data byte is touched.

Stricter than the format's reference reader, never laxer: what this accepts, that accepts. Beyond it are
refused: repeated tensor names, empty, overlong and unprintable names, more than 16 dimensions, dimensions
whose product overflows although one of them is zero, over a million tensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy.typing as npt

from .. import storage
from ..errors import InputRejected, show
from ..kernels.dtypes import DTYPES
from .base import FileIdentity, TensorInfo
from .documents import unique

MAX_HEADER = 100_000_000
MAX_TENSORS = 1_000_000
MAX_RANK = 16
MAX_NAME = 4096
_MAX_COUNT = 1 << 63
_FIELDS = {"dtype", "shape", "data_offsets"}


class SafetensorsFile:
    """One open file. ``tensors`` and ``metadata`` come from the header; ``notices`` are worth a warning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = storage.open_read(path)
        try:
            self.identity = FileIdentity.of(path, storage.facts(self._descriptor))
            header, begin = _read_header(self._descriptor, path, self.identity.size)
            self._begin = begin
            parsed = parse_header(header, self.identity.size - begin, path.name)
            self.tensors, self.metadata, self.notices = parsed
        except BaseException:
            storage.close(self._descriptor)
            raise

    def read(self, info: TensorInfo, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` with elements from ``start`` on, stored as they are."""
        offset = self._begin + info.offset + start * DTYPES[info.dtype].bits // 8
        what = f"{self.path} (tensor {show(info.name)})"
        storage.pread_into(self._descriptor, memoryview(out).cast("B"), offset, what)

    def prefetch(self, info: TensorInfo) -> None:
        storage.advise_willneed(self._descriptor, self._begin + info.offset, info.nbytes)

    def close(self) -> None:
        storage.close(self._descriptor)


def _read_header(descriptor: int, path: Path, size: int) -> tuple[bytes, int]:
    """The header's bytes, and where the data begins."""
    head = bytearray(min(size, 64))
    storage.pread_into(descriptor, memoryview(head), 0, path)
    _refuse_other_files(bytes(head), path.name)
    if size < 8:
        raise InputRejected(f"{show(path.name)} is no safetensors file: it has {size} bytes, the length alone takes 8")
    (length,) = struct.unpack("<Q", head[:8])
    if length > MAX_HEADER:
        raise InputRejected(f"{show(path.name)}: header of {length} bytes, at most {MAX_HEADER} are accepted")
    if length > size - 8:
        raise InputRejected(f"{show(path.name)}: header of {length} bytes in a file of {size}: the file is cut short")
    header = bytearray(length)
    storage.pread_into(descriptor, memoryview(header), 8, path)
    return bytes(header), 8 + length


def _refuse_other_files(head: bytes, file: str) -> None:
    """The two things most often saved under this name."""
    if head.startswith(b"version https://git-lfs"):
        raise InputRejected(f"{show(file)} is a Git LFS pointer, not the weights: fetch them with git lfs pull")
    if head[:64].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise InputRejected(f"{show(file)} is an HTML page, not weights: the download failed, repeat it")


Header = tuple[dict[str, TensorInfo], dict[str, str], list[str]]


def parse_header(raw: bytes, data_size: int, file: str) -> Header:
    """Check a header against the size of the data behind it.

    Returns (tensors by name, metadata, notices). Raises InputRejected naming file and tensor.
    """
    content = _load_json(raw, file)
    metadata = _metadata(content.pop("__metadata__", {}), file)
    tensors: dict[str, TensorInfo] = {}
    ranges: list[tuple[int, int, str]] = []
    notices: list[str] = []
    for name, entry in content.items():
        info, end = _entry(name, entry, file)
        tensors[name] = info
        ranges.append((info.offset, end, name))
        notices += _unknown_fields(name, entry, file)
    _check_tiling(ranges, data_size, file)
    return tensors, metadata, notices


def _load_json(raw: bytes, file: str) -> dict[str, Any]:
    if raw.count(b'"dtype"') > MAX_TENSORS:
        raise InputRejected(f"{show(file)}: more than {MAX_TENSORS} tensors in one header")
    if not raw.startswith(b"{"):
        raise InputRejected(f"{show(file)}: the header does not begin with {{")
    try:
        text = raw.decode("utf-8")
        content = json.loads(text, object_pairs_hook=unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise InputRejected(f"{show(file)}: the header is not UTF-8: {error.reason}") from error
    except RecursionError:
        raise InputRejected(f"{show(file)}: the header is nested too deeply") from None
    except ValueError as error:
        raise InputRejected(f"{show(file)}: the header is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputRejected(f"{show(file)}: the header is not an object")
    return content


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _metadata(value: Any, file: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise InputRejected(f"{show(file)}: __metadata__ must map strings to strings")
    return value


def _entry(name: str, entry: Any, file: str) -> tuple[TensorInfo, int]:
    """One tensor's info and the end of its bytes."""
    where = f"{show(file)}: tensor {show(name)}"
    if not name or len(name.encode("utf-8", "surrogatepass")) > MAX_NAME or not name.isprintable():
        raise InputRejected(f"{where}: the name is empty, longer than {MAX_NAME} bytes, or has control characters")
    if not isinstance(entry, dict) or not entry.keys() >= _FIELDS:
        missing = sorted(_FIELDS - set(entry)) if isinstance(entry, dict) else "everything"
        raise InputRejected(f"{where}: lacks {missing}")
    dtype, shape = entry["dtype"], _naturals(entry["shape"], f"{where}: shape")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputRejected(f"{where}: unknown dtype {show(dtype)}")
    if len(shape) > MAX_RANK:
        raise InputRejected(f"{where}: {len(shape)} dimensions, at most {MAX_RANK} are accepted")
    if prod(size for size in shape if size) * DTYPES[dtype].bits >= _MAX_COUNT:
        raise InputRejected(f"{where}: shape {shape} overflows")
    offsets = _naturals(entry["data_offsets"], f"{where}: data_offsets")
    return TensorInfo(name, dtype, shape, file, offsets[0] if offsets else 0), _end(where, dtype, shape, offsets)


def _naturals(value: Any, where: str) -> tuple[int, ...]:
    whole = isinstance(value, list) and all(type(item) is int and 0 <= item < _MAX_COUNT for item in value)
    if not whole:
        raise InputRejected(f"{where} must be a list of whole numbers, found {show(value)}")
    return tuple(value)


def _end(where: str, dtype: str, shape: tuple[int, ...], offsets: tuple[int, ...]) -> int:
    bits = prod(shape) * DTYPES[dtype].bits
    if len(offsets) != 2 or offsets[1] < offsets[0]:
        raise InputRejected(f"{where}: data_offsets {list(offsets)} are no [begin, end]")
    if bits % 8:
        raise InputRejected(f"{where}: {bits} bits do not fill whole bytes")
    if offsets[1] - offsets[0] != bits // 8:
        found = offsets[1] - offsets[0]
        raise InputRejected(f"{where}: {found} bytes for {dtype} {list(shape)}, expected {bits // 8}")
    return offsets[1]


def _unknown_fields(name: str, entry: dict[str, Any], file: str) -> Iterator[str]:
    for key in sorted(entry.keys() - _FIELDS):
        yield f"{show(file)}: tensor {show(name)}: unknown field {show(key)} ignored"


def _check_tiling(ranges: list[tuple[int, int, str]], size: int, file: str) -> None:
    """The tensors' bytes must fill the data exactly: no hole, no overlap, nothing behind the last."""
    expected = 0
    for begin, end, name in sorted(ranges):
        if end > size:
            raise InputRejected(f"{show(file)}: tensor {show(name)} ends at byte {end} of {size}: the file is cut short")
        if begin != expected:
            what = "overlaps the one before it" if begin < expected else f"leaves a hole of {begin - expected} bytes"
            raise InputRejected(f"{show(file)}: tensor {show(name)} {what}")
        expected = end
    if expected != size:
        raise InputRejected(f"{show(file)}: {size - expected} bytes behind the last tensor")

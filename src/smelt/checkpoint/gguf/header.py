"""A strict reader of GGUF headers: every length is held against the file before anything is allocated.

A header is the magic, a version, the numbers of tensors and of metadata entries, the entries, and the tensors'
names, shapes, types and offsets; then the data, in which the tensors lie in this order, each at the next
multiple of the alignment. What this reader accepts, llama.cpp's accepts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ... import storage
from ...errors import InputRejected, show
from ..safetensors import MAX_TENSORS, name_problem
from ..stored import Stored
from .format import (
    ALIGNMENT,
    ALIGNMENT_KEY,
    ARRAY,
    BOOL,
    MAGIC,
    MAX_RANK,
    READABLE,
    SCALARS,
    TEXT,
    TYPE_NAMES,
    U32,
    VERSIONS,
    StoredTensor,
    aligned,
    bytes_of,
    elements_of,
)  # fmt: skip

MAX_HEADER = 512 << 20  # bytes
MAX_ENTRIES = 100_000
MAX_ITEMS = 4_000_000  # of an array
MAX_KEY = 65_535
_CHUNK = 1 << 20


class Texts(tuple[bytes, ...]):
    """An array of strings as they are stored: most are never looked at."""

    def decoded(self) -> list[str]:
        """UnicodeDecodeError where one is no UTF-8."""
        return [text.decode() for text in self]


@dataclass(frozen=True)
class GgufHeader:
    """What a header says. Metadata values are numbers, truth values, text, numpy arrays and :class:`Texts`.

    ``kinds`` holds the number of each value's type, or that of an array's items.
    """

    metadata: Mapping[str, Any]
    kinds: Mapping[str, int]
    tensors: Mapping[str, StoredTensor]
    notices: tuple[str, ...] = ()


def read_header(stored: Stored) -> GgufHeader:
    """The header of an open file. InputRejected at the first thing that is wrong."""
    where, size = storage.shown(stored.name), stored.identity.size
    try:
        return _parsed(_Cursor(stored, size), stored.identity.path.name, size)
    except UnicodeDecodeError as error:
        raise InputRejected(f"{where}: a name in the header is not UTF-8 text: {error.reason}") from error
    except ValueError as error:
        raise InputRejected(f"{where} {error}") from error


class _Cursor:
    """Goes through a file front to back. ValueError, with the end of a sentence, where the file is too short."""

    def __init__(self, stored: Stored, size: int) -> None:
        self._stored, self._size = stored, size
        self._buffer, self._at, self._read = b"", 0, 0

    @property
    def position(self) -> int:
        return self._read - len(self._buffer) + self._at

    def take(self, count: int, what: str) -> bytes:
        end = self._at + count
        if end > len(self._buffer):
            self._fill(count, what)
            end = count
        part = self._buffer[self._at : end]
        self._at = end
        return part

    def _fill(self, count: int, what: str) -> None:
        left = self._size - self.position
        if count > left:
            raise ValueError(f"is cut short: {what} takes {count} bytes, {left} are there")
        if self.position + count > MAX_HEADER:
            raise ValueError(f"has a header of more than {MAX_HEADER} bytes")
        rest = self._buffer[self._at :]
        more = bytearray(min(max(count - len(rest), _CHUNK), self._size - self._read))
        self._stored.read_alone(memoryview(more), self._read)
        self._buffer, self._at, self._read = rest + bytes(more), 0, self._read + len(more)

    def number(self, code: str, what: str) -> Any:
        layout = "<" + code
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def text(self, what: str) -> bytes:
        return self.take(self.number("Q", f"the length of {what}"), what)


def _parsed(cursor: _Cursor, file: str, size: int) -> GgufHeader:
    _check_beginning(cursor)
    tensors, entries = cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of entries")
    if tensors > MAX_TENSORS or entries > MAX_ENTRIES:
        limits = f"at most {MAX_TENSORS} and {MAX_ENTRIES} are accepted"
        raise ValueError(f"names {tensors} tensors and {entries} metadata entries: {limits}")
    metadata: dict[str, Any] = {}
    kinds: dict[str, int] = {}
    for _ in range(entries):
        key = cursor.take(_key_length(cursor), "a metadata key").decode()
        if key in metadata:
            raise ValueError(f"gives the metadata key {show(key)} twice")
        metadata[key], kinds[key] = _value(cursor, show(key))
    infos = [_info(cursor) for _ in range(tensors)]
    alignment = _alignment(metadata, kinds)
    found = dict(_placed(infos, file, cursor.position, alignment, size))
    return GgufHeader(metadata, kinds, found, tuple(_after_the_last(found, size, alignment)))


def _check_beginning(cursor: _Cursor) -> None:
    magic = cursor.take(4, "the magic")
    if magic != MAGIC:
        raise ValueError(f"is no GGUF file: it begins with {magic!r}, expected {MAGIC!r}")
    version = cursor.number("I", "the version")
    if version and version & 0xFFFF == 0:
        raise ValueError("is big-endian GGUF: only little-endian files are read")
    if version not in VERSIONS:
        raise ValueError(f"is GGUF version {version}, expected 2 or 3: convert it with a current llama.cpp")


def _key_length(cursor: _Cursor) -> int:
    length: int = cursor.number("Q", "the length of a metadata key")
    if not 0 < length <= MAX_KEY:
        raise ValueError(f"has a metadata key of {length} bytes, expected 1 to {MAX_KEY}")
    return length


def _value(cursor: _Cursor, key: str) -> tuple[Any, int]:
    kind = cursor.number("I", f"the type of {key}")
    if kind == ARRAY:
        return _array(cursor, key)
    if kind == TEXT:
        return cursor.text(f"the value of {key}").decode("utf-8", "surrogateescape"), kind
    if kind not in SCALARS:
        raise ValueError(f"gives the metadata key {key} the unknown type {kind}")
    if kind == BOOL:
        return bool(_truth(np.frombuffer(cursor.take(1, key), np.uint8), key)[0]), kind
    return cursor.number(SCALARS[kind], key), kind


def _array(cursor: _Cursor, key: str) -> tuple[Any, int]:
    kind, count = cursor.number("I", f"the type of {key}"), cursor.number("Q", f"the length of {key}")
    if kind != TEXT and kind not in SCALARS:
        raise ValueError(f"gives the items of {key} the type {kind}, expected numbers or strings")
    if count > MAX_ITEMS:
        raise ValueError(f"gives {key} {count} items, at most {MAX_ITEMS} are accepted")
    if kind == TEXT:
        return Texts(cursor.text(f"an item of {key}") for _ in range(count)), kind
    dtype = np.dtype("<" + SCALARS[kind])
    items = np.frombuffer(cursor.take(count * dtype.itemsize, key), np.uint8 if kind == BOOL else dtype)
    return (_truth(items, key) if kind == BOOL else items), kind


def _truth(items: Any, key: str) -> Any:
    if (items > 1).any():
        raise ValueError(f"has a byte other than 0 and 1 as a truth value of {key}")
    return items.view(np.bool_)


_Info = tuple[str, str, tuple[int, ...], int]


def _info(cursor: _Cursor) -> _Info:
    """Name, type, shape, and where in the data the tensor begins."""
    name = cursor.text("a tensor's name").decode()
    if problem := name_problem(name):
        raise ValueError(f"has the tensor name {show(name)}, which {problem}")
    tensor = f"tensor {show(name)}"
    rank = cursor.number("I", tensor)
    if rank > MAX_RANK:
        raise ValueError(f"gives {tensor} {rank} dimensions, at most {MAX_RANK} are accepted")
    sizes = struct.unpack(f"<{rank}Q", cursor.take(8 * rank, tensor))
    if 0 in sizes or prod(sizes) >= 1 << 63:
        raise ValueError(f"gives {tensor} the impossible shape {list(sizes)}")
    number, offset = cursor.number("I", tensor), cursor.number("Q", tensor)
    kind = TYPE_NAMES.get(number, f"number {number}")
    if kind not in READABLE:
        raise ValueError(f"stores {tensor} as {kind}, which is not read: quantise it as {', '.join(READABLE)}")
    row = sizes[0] if rank else 1
    if row % elements_of(kind):
        raise ValueError(f"stores {tensor} as {kind}, in blocks of {elements_of(kind)}, but its rows have {row}")
    return name, kind, tuple(reversed(sizes)), offset


def _alignment(metadata: Mapping[str, Any], kinds: Mapping[str, int]) -> int:
    alignment = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
    if kinds.get(ALIGNMENT_KEY, U32) != U32 or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"says {ALIGNMENT_KEY} = {show(alignment)}, expected a power of two as uint32")
    return int(alignment)


def _placed(infos: list[_Info], file: str, end: int, alignment: int, size: int) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors by name, in the order of the file: one behind the other, the last within the file."""
    data = aligned(end, alignment)
    expected, seen = 0, set()
    for name, kind, shape, offset in infos:
        tensor = f"tensor {show(name)}"
        if name in seen:
            raise ValueError(f"has {tensor} twice")
        if offset != expected:
            raise ValueError(f"puts {tensor} at data byte {offset}, expected {expected}")
        stored = StoredTensor(name, kind, shape, file, data + offset)
        if stored.offset + stored.nbytes > size:
            raise ValueError(f"is cut short: {tensor} ends at byte {stored.offset + stored.nbytes} of {size}")
        expected = aligned(offset + bytes_of(kind, stored.count), alignment)
        seen.add(name)
        yield name, stored


def _after_the_last(tensors: Mapping[str, StoredTensor], size: int, alignment: int) -> Iterator[str]:
    last = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=size)
    if size > aligned(last, alignment):
        yield f"{size - last} bytes follow the last tensor and are not read"

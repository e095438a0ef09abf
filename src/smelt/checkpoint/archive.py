"""The directory of a zip file of torch.save, read strictly: where each record's bytes lie.

Only what torch writes is taken: records stored as they are, one after another from the first byte on, the
directory behind them, and nothing else. So no reader can see other contents than this one does.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from ..errors import show
from .stored import Stored

#: Bytes of a directory: a hundred for each of a million records.
MAX_DIRECTORY = 128 << 20

_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")

#: Behind a record its sizes may stand once more.
_DESCRIPTOR = 24

_FULL = 0xFFFFFFFF


class Record(NamedTuple):
    """``start`` is the first byte of what is stored."""

    start: int
    size: int


class _Entry(NamedTuple):
    name: str
    header: int
    size: int


def records_of(stored: Stored) -> dict[str, Record]:
    """Record -> where it lies in the file; names without the leading folder, which all share.

    ValueError with the end of a sentence when it is not such a file.
    """
    begin, entries = _directory(stored)
    names = [entry.name.partition("/")[2] for entry in entries]
    _check_names([entry.name for entry in entries])
    if any(entry.header + _LOCAL.size + len(entry.name.encode()) > begin for entry in entries):
        raise ValueError("it lists records beyond its directory")
    found = {name: _located(stored, e) for name, e in zip(names, entries, strict=True)}
    _check_order([(entry.header, found[name]) for name, entry in zip(names, entries, strict=True)], begin)
    return found


def _directory(stored: Stored) -> tuple[int, list[_Entry]]:
    """Where the directory begins, and its entries."""
    count, length, begin, end = _bounds(stored)
    if begin + length != end or length > MAX_DIRECTORY or count * _ENTRY.size > length:
        raise ValueError("its directory is not where it should be")
    entries = list(_entries(_bytes(stored, begin, length)))
    if len(entries) != count or not entries:
        raise ValueError(f"its directory lists {len(entries)} records, {count} are announced")
    return begin, entries


def _bounds(stored: Stored) -> tuple[int, int, int, int]:
    """Number of entries, length and beginning of the directory, and where it must end."""
    place = stored.identity.size - _END.size
    if place < 0:
        raise ValueError("it is too short for a zip archive")
    signature, disk, first, here, count, length, begin, comment = _END.unpack(_bytes(stored, place, _END.size))
    if signature != b"PK\5\6" or comment:
        raise ValueError("it does not end as a zip archive of torch does")
    if disk or first or here != count:
        raise ValueError("it is one volume of several")
    wide = _wide_bounds(stored, place - _LOCATOR.size)
    return wide or (count, length, begin, place)


def _wide_bounds(stored: Stored, place: int) -> tuple[int, int, int, int] | None:
    """The same from the record that large archives have in addition, found through the locator at ``place``."""
    if place < _END64.size:
        return None
    signature, _, end, _ = _LOCATOR.unpack(_bytes(stored, place, _LOCATOR.size))
    if signature != b"PK\6\7":
        return None
    if end + _END64.size != place:
        raise ValueError("its directory is not where it should be")
    signature, *_, count, length, begin = _END64.unpack(_bytes(stored, end, _END64.size))
    if signature != b"PK\6\6":
        raise ValueError("its directory is not where it should be")
    return count, length, begin, end


def _entries(data: bytes) -> Iterator[_Entry]:
    place = 0
    while place < len(data):
        signature, _, _, flags, method, _, _, _, packed, size, length, more, comment, *_, header = _ENTRY.unpack_from(
            data, place
        )
        name_at, extra_at = place + _ENTRY.size, place + _ENTRY.size + length
        place = extra_at + more + comment
        name = data[name_at:extra_at].decode("utf-8")
        if signature != b"PK\1\2" or place > len(data):
            raise ValueError("its directory is damaged")
        size, packed, header = _wide(data[extra_at : extra_at + more], size, packed, header)
        if method or size != packed:
            raise ValueError(f"record {show(name)} is compressed")
        if flags & 1:
            raise ValueError(f"record {show(name)} is encrypted")
        yield _Entry(name, header, size)


def _wide(extra: bytes, *fields: int) -> tuple[int, ...]:
    """The fields, those that are too large for 32 bits from the extra field that holds them."""
    place, wide = 0, b""
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, place)
        wide = extra[place + 4 : place + 4 + length] if kind == 1 else wide
        place += 4 + length
    values = iter(struct.unpack(f"<{len(wide) // 8}Q", wide[: len(wide) // 8 * 8]))
    return tuple(next(values, field) if field == _FULL else field for field in fields)


def _located(stored: Stored, entry: _Entry) -> Record:
    """Behind the record's own header, which must be of the same name."""
    fields = _LOCAL.unpack(_bytes(stored, entry.header, _LOCAL.size))
    name = _bytes(stored, entry.header + _LOCAL.size, len(entry.name.encode()))
    if fields[0] != b"PK\3\4" or fields[9] != len(name) or name != entry.name.encode():
        raise ValueError(f"record {show(entry.name)} is not where the directory says")
    return Record(entry.header + _LOCAL.size + fields[9] + fields[10], entry.size)


def _bytes(stored: Stored, start: int, size: int) -> bytes:
    data = bytearray(size)
    stored.read_into(memoryview(data), start)
    return bytes(data)


def _check_names(names: list[str]) -> None:
    """One folder for all, each name once, none that leads elsewhere."""
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"record {show(name)} is there twice")
    folders = {name.partition("/")[0] for name in names}
    for name in names:
        if len(folders) > 1 or not all(part not in ("", ".", "..") for part in name.split("/")) or "\\" in name:
            raise ValueError(f"record {show(name)} is no file in the folder {show(min(folders))}")


def _check_order(placed: list[tuple[int, Record]], end: int) -> None:
    """From byte 0 up to the directory at ``end``: no record shares bytes, and nothing lies between them."""
    ordered = sorted(placed)
    headers = [*(header for header, _ in ordered), end]
    rests = [after - sum(record) for (_, record), (_, after) in zip(ordered, pairwise(headers), strict=True)]
    if headers[0] or not all(0 <= rest <= _DESCRIPTOR for rest in rests):
        raise ValueError("its records overlap, or something lies between them")

"""Deterministic, streaming safetensors output: headers first, tensors in place, in any order.

The layout is known beforehand, so nothing is held in memory, the disk space is reserved before any work,
and the same tensors give the same bytes.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

import numpy.typing as npt

from .. import storage
from ..errors import UsageError, show
from .base import Part, TensorInfo
from .safetensors import MAX_HEADER, MAX_TENSORS

#: The data begins at a multiple of this, so that every dtype can be memory-mapped and read by vector code.
ALIGNMENT = 64

_INDEX = ".safetensors.index.json"

#: Other loaders look for this.
_METADATA = {"format": "pt"}

#: After so many bytes per file the disk is asked to begin, so that the last sync finds little to do.
_WRITEBACK = 32 << 20

#: Larger alignment first, and dtypes of one size as the reference implementation orders them.
_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip
_RANK = {code: rank for rank, code in enumerate(_ORDER)}


_WHOLE = Part()


@dataclass(frozen=True)
class Shard:
    """One file to be. ``tensors`` lie in the order of their offsets, which count from the file's beginning.

    ``file`` is its path in the checkpoint's folder; the names in its header lack the prefix of ``part``.
    """

    file: str
    header: bytes
    size: int
    tensors: tuple[TensorInfo, ...]
    part: Part = _WHOLE

    @property
    def offsets(self) -> dict[str, int]:
        """Tensor name -> where its first byte lies in the file."""
        return {tensor.name: tensor.offset for tensor in self.tensors}


def plan_shards(
    tensors: Sequence[TensorInfo], shard_size: int, metadata: Mapping[str, str] = MappingProxyType({}),
    parts: Sequence[Part] = (_WHOLE,),
) -> list[Shard]:  # fmt: skip
    """Lay tensors out in files of at most ``shard_size`` bytes of data, in the order given.

    A larger tensor gets a file of its own. One file is model.safetensors, several are numbered. ``metadata``
    goes into every header. Each of ``parts`` has files of its own. Raises UsageError when a file would hold more
    tensors than a header may name, or a tensor belongs to no part.
    """
    _refuse_twins(tensors)
    said = {**_METADATA, **metadata}
    owned = _by_part(tensors, parts)
    return [shard for part, own in owned.items() for shard in _shards_of(part, own, shard_size, said)]


def _by_part(tensors: Sequence[TensorInfo], parts: Sequence[Part]) -> dict[Part, list[TensorInfo]]:
    """Each part with its tensors; a tensor is of the part with the longest prefix."""
    nested = sorted(parts, key=lambda part: -len(part.prefix))
    owned: dict[Part, list[TensorInfo]] = {part: [] for part in parts}
    for tensor in tensors:
        part = next((part for part in nested if tensor.name.startswith(part.prefix)), None)
        if part is None:
            known = ", ".join(part.folder for part in parts)
            raise UsageError(f"tensor {show(tensor.name)} belongs to none of the parts {known}: leave it out")
        owned[part].append(tensor)
    return {part: own for part, own in owned.items() if own or len(parts) == 1}


def _shards_of(part: Part, tensors: Sequence[TensorInfo], shard_size: int, metadata: Mapping[str, str]) -> list[Shard]:
    groups: list[list[TensorInfo]] = [[]]
    held = 0
    for tensor in tensors:
        if groups[-1] and held + tensor.nbytes > shard_size:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += tensor.nbytes
    names = [_file_name(part, number, len(groups)) for number in range(1, len(groups) + 1)]
    return [_shard(name, group, metadata, part) for name, group in zip(names, groups, strict=True)]


def plan_file(file: str, tensors: Sequence[TensorInfo]) -> Shard:
    """Lay all tensors out in one file of this name. Raises UsageError as :func:`plan_shards` does."""
    _refuse_twins(tensors)
    return _shard(file, tensors, _METADATA)


def _refuse_twins(tensors: Sequence[TensorInfo]) -> None:
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("a tensor is given twice")


def _file_name(part: Part, number: int, total: int) -> str:
    return part.inside(f"{part.stem}{f'-{number:05d}-of-{total:05d}' if total > 1 else ''}.safetensors")


def _shard(file: str, tensors: Iterable[TensorInfo], metadata: Mapping[str, str], part: Part = _WHOLE) -> Shard:
    ordered = sorted(tensors, key=lambda tensor: (_RANK[tensor.dtype], tensor.name))
    ends = [0, *accumulate(tensor.nbytes for tensor in ordered)]
    named = [replace(tensor, name=tensor.name.removeprefix(part.prefix)) for tensor in ordered]
    header = _header(named, ends, file, metadata)
    located = (replace(tensor, file=file, offset=len(header) + ends[i]) for i, tensor in enumerate(ordered))
    return Shard(file, header, len(header) + ends[-1], tuple(located), part)


def _header(ordered: Sequence[TensorInfo], ends: Sequence[int], file: str, metadata: Mapping[str, str]) -> bytes:
    """Length and JSON, padded with spaces so that the data begins at a multiple of :data:`ALIGNMENT`."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    for i, tensor in enumerate(ordered):
        shape, offsets = list(tensor.shape), [ends[i], ends[i + 1]]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER or len(ordered) > MAX_TENSORS:
        raise UsageError(f"{file} would hold {len(ordered)} tensors, too many for one header: ask for smaller shards")
    return struct.pack("<Q", len(text)) + text


class CheckpointWriter:
    """Writes tensors piece by piece at their final places. Thread-safe.

    The files must not exist yet, unless ``again``: then what an earlier run left of them is taken up. They are
    whole once :meth:`finish` has returned; :meth:`abort` lets go of them in any state, and does nothing after that.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], *, again: bool = False) -> None:
        self._folder = folder
        self._open = storage.reopen if again else storage.create
        self._shards = tuple(shards)
        self._tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
        self._missing = sum(tensor.nbytes for tensor in self._tensors.values())
        self._waiting = {shard.file: 0 for shard in shards}
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        try:
            for shard in shards:
                self._create(shard)
        except BaseException:
            self.abort()
            raise

    def _create(self, shard: Shard) -> None:
        path = self._folder / shard.file
        storage.make_way(path)
        self._descriptors[shard.file] = descriptor = self._open(path, shard.size)
        storage.pwrite_all(descriptor, memoryview(shard.header), 0, path)

    def write(self, name: str, start: int, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Write ``array`` (contiguous, of the dtype's storage type) as the tensor's items from ``start`` on.

        Every item is to be written once. Returns the items as they will be read: the same ones. Raises
        OperationFailed when the disk fails.
        """
        tensor = self._tensors[name]
        offset = start * array.itemsize
        if start < 0 or offset + array.nbytes > tensor.nbytes:
            raise ValueError(f"items {start} to {start + array.size} of {tensor} are outside of the tensor")
        descriptor = self._descriptors[tensor.file]
        storage.pwrite_all(descriptor, array.data, tensor.offset + offset, self._folder / tensor.file)
        if self._is_due(tensor.file, array.nbytes):
            storage.start_writeback(descriptor, 0, 0)
        return array

    def read(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` (storage type) with the tensor's items from ``start`` on, as they are in the file now."""
        tensor = self._tensors[name]
        place = tensor.offset + start * out.itemsize
        storage.pread_into(self._descriptors[tensor.file], out.data, place, self._folder / tensor.file)

    def skip(self, name: str) -> None:
        """All of this tensor is there already."""
        with self._lock:
            self._missing -= self._tensors[name].nbytes

    def sync(self) -> None:
        """Wait until all that was written so far is on the disk, and so are the files' names."""
        for file, descriptor in self._descriptors.items():
            storage.fsync(descriptor, self._folder / file)
        for folder in {(self._folder / file).parent for file in self._descriptors}:
            storage.fsync_directory(folder)

    def _is_due(self, file: str, nbytes: int) -> bool:
        with self._lock:
            self._missing -= nbytes
            waiting = self._waiting[file] + nbytes
            due = waiting >= _WRITEBACK
            self._waiting[file] = 0 if due else waiting
            return due

    def finish(self) -> None:
        """Wait until all is on the disk, close, and add the index where there are several files."""
        if self._missing:
            raise ValueError(f"{self._missing} bytes too few were written")
        self.sync()
        self.abort()
        for part in dict.fromkeys(shard.part for shard in self._shards):
            shards = [shard for shard in self._shards if shard.part == part]
            if len(shards) > 1:
                storage.write_small(self._folder / part.inside(f"{part.stem}{_INDEX}"), _index(part, shards))

    def abort(self) -> None:
        """Close all files, whatever state they are in."""
        while self._descriptors:
            storage.close(self._descriptors.popitem()[1])


def _index(part: Part, shards: Sequence[Shard]) -> bytes:
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    files = {tensor.name.removeprefix(part.prefix): PurePath(tensor.file).name for tensor in tensors}
    content = {
        "metadata": {
            "total_parameters": sum(tensor.count for tensor in tensors),
            "total_size": sum(tensor.nbytes for tensor in tensors),
        },
        "weight_map": dict(sorted(files.items())),
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

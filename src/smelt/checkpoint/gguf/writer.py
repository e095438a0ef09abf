"""Streaming GGUF output: the header first, elements in place, in any order."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ... import storage
from ...errors import InputRejected, OperationFailed, UsageError, show
from ...kernels.blocks import BLOCK_TYPES, pack, unpack
from ...kernels.dtypes import DTYPES, narrowed
from ..base import Checkpoint, TensorInfo
from .checkpoint import GgufCheckpoint, interleaved
from .format import bytes_of
from .layout import Described, GgufLayout, Placement, file_name, plan_gguf

#: Elements that are read and written at a time: whole blocks of every type.
_PART = 1 << 19


class GgufWriter:
    """Writes tensors piece by piece at their final places. Thread-safe.

    The file must not exist yet, unless ``again``: then what an earlier run left of it is taken up. It is whole once
    :meth:`finish` has returned; :meth:`abort` lets go of it in any state, and does nothing after that.
    """

    def __init__(self, folder: Path, layout: GgufLayout, *, again: bool = False) -> None:
        self._path = folder / layout.file
        self._infos = {info.name: info for info in layout.tensors}
        self._places = layout.placements
        self._missing = sum(info.count for info in layout.tensors)
        self._lock = threading.Lock()
        self._descriptor = (storage.reopen if again else storage.create)(self._path, layout.size)
        try:
            for offset, data in {0: layout.header, **layout.fixed}.items():
                storage.pwrite_all(self._descriptor, memoryview(data), offset, self._path)
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, start: int, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Write elements from ``start`` on, in the dtype and the storage type of the layout's tensor.

        Pieces of quantised tensors are whole blocks; every element is to be written once. Returns the elements as
        they will be read. Raises OperationFailed when the disk fails, or where a value cannot be quantised.
        """
        info, place = self._infos[name], self._places[name]
        if start < 0 or start + len(array) > info.count:
            raise ValueError(f"items {start} to {start + len(array)} of {info} are outside of the tensor")
        data, read = _encoded(place, array, name)
        for first, last, at in _runs(place, start, len(array)):
            begin, end = (bytes_of(place.kind, edge) for edge in (first, last))
            offset = place.offset + bytes_of(place.kind, at)
            storage.pwrite_all(self._descriptor, data[begin:end], offset, self._path)
        with self._lock:
            self._missing -= len(array)
        return read

    def read(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` (storage type) with the elements from ``start`` on, as a reader finds them now: whole blocks."""
        place = self._places[name]
        data = np.empty(bytes_of(place.kind, len(out)), np.uint8)
        for first, last, at in _runs(place, start, len(out)):
            begin, end = (bytes_of(place.kind, edge) for edge in (first, last))
            offset = place.offset + bytes_of(place.kind, at)
            storage.pread_into(self._descriptor, data[begin:end].data, offset, self._path)
        _decode(place, data, out)

    def skip(self, name: str) -> None:
        """All of this tensor is there already."""
        with self._lock:
            self._missing -= self._infos[name].count

    def sync(self) -> None:
        """Wait until all that was written so far is on the disk, and so is the file's name."""
        storage.fsync(self._descriptor, self._path)
        storage.fsync_directory(self._path.parent)

    def finish(self) -> None:
        """Wait until all is on the disk, and close."""
        if self._missing:
            raise ValueError(f"{self._missing} elements too few were written")
        storage.fsync(self._descriptor, self._path)
        self.abort()

    def abort(self) -> None:
        """Close the file, whatever state it is in."""
        if self._descriptor >= 0:
            storage.close(self._descriptor)
        self._descriptor = -1


def _encoded(place: Placement, array: npt.NDArray[Any], name: str) -> tuple[memoryview, npt.NDArray[Any]]:
    """The bytes to store, and what a reader makes of them."""
    if place.kind in BLOCK_TYPES:
        blocks, read = np.empty(bytes_of(place.kind, len(array)), np.uint8), np.empty_like(array)
        if not pack(place.kind, array, blocks):
            raise OperationFailed(
                f"tensor {show(name)} holds a value that {place.kind} does not: NaN, Inf or too large"
            )
        unpack(place.kind, blocks, read)
        return blocks.data, read
    if place.shifted:
        stored = array + np.float32(1)
        return _bytes(stored), stored - np.float32(1)
    return _bytes(array), array


def _decode(place: Placement, data: npt.NDArray[np.uint8], out: npt.NDArray[Any]) -> None:
    """What a reader makes of stored bytes."""
    if place.kind in BLOCK_TYPES:
        unpack(place.kind, data, out)
        return
    out[:] = data.view(out.dtype)
    if place.shifted:
        out -= np.float32(1)


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.view(np.uint8).data


def _runs(place: Placement, start: int, count: int) -> list[tuple[int, int, int]]:
    """(first, last, where) of the pieces of a run that lie together: element ``where`` of the tensor."""
    if place.heads is None:
        return [(0, count, start)]
    width, end = place.width, start + count
    rows = np.arange(start // width, -(-end // width))
    homes = interleaved(rows, place.rows, place.heads)
    return [
        (
            max(row * width, start) - start,
            min((row + 1) * width, end) - start,
            home * width + max(start - row * width, 0),
        )
        for row, home in zip(rows.tolist(), homes.tolist(), strict=True)
    ]


def write_gguf(
    checkpoint: Checkpoint, path: str | Path, dtype: str = "Q8_0", progress: Callable[[int], None] | None = None
) -> list[str]:
    """Turn a checkpoint into the GGUF file ``path``: whole, or not at all. Returns what is worth telling.

    ``dtype``: of the matrices, "F32", "F16", "BF16" or "Q8_0"; ``progress`` is told how many bytes more have been read.
    Raises InputRejected when the model cannot be written
    to GGUF, UsageError when there is such a file, OperationFailed when reading or writing fails.
    """
    path = Path(path)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    strange = [name for name, info in checkpoint.tensors.items() if not DTYPES[info.dtype].arithmetic]
    InputRejected.gather(f"tensor {show(name)} holds no floating numbers" for name in strange[:20])
    if storage.exists(path):
        raise UsageError(f"{show(path)} exists: choose another name, or remove it first")
    layout = plan_gguf(file_name(path), shapes, described(checkpoint, path.stem), dtype)
    staging = path.with_name(f"{path.name}.smelt-{secrets.token_hex(4)}")
    storage.ensure_folder(staging)
    try:
        writer = GgufWriter(staging, layout)
        try:
            _copy(checkpoint, layout, writer, progress)
            writer.finish()
        finally:
            writer.abort()
        checkpoint.check_unchanged()
        storage.publish_file(staging / layout.file, path)
    finally:
        storage.remove_tree(staging)
    return list(layout.notices)


def described(checkpoint: Checkpoint, title: str) -> Described:
    """What is known of a checkpoint beside its tensors."""
    files = checkpoint.side_files
    if isinstance(checkpoint, GgufCheckpoint):
        return Described(checkpoint.config, files, checkpoint.header, title, spelled=files)
    return Described(checkpoint.config, files, title=title)


def _copy(
    checkpoint: Checkpoint, layout: GgufLayout, writer: GgufWriter, progress: Callable[[int], None] | None
) -> None:
    for info in sorted(layout.tensors, key=lambda info: _source_order(checkpoint, info.name)):
        source = checkpoint.tensors[info.name]
        held = np.empty(min(_PART, source.count), DTYPES[source.dtype].storage)
        for start in range(0, source.count, _PART):
            part = held[: source.count - start]
            checkpoint.read(info.name, start, part)
            writer.write(info.name, start, _converted(part, source, info.dtype))
            if progress is not None:
                progress(part.nbytes)


def _source_order(checkpoint: Checkpoint, name: str) -> tuple[str, int]:
    source = checkpoint.tensors[name]
    return source.file, source.offset


def _converted(part: npt.NDArray[Any], source: TensorInfo, wanted: str) -> npt.NDArray[Any]:
    """Stored elements rounded once to another dtype, as stored. OperationFailed where one is not finite there."""
    values = DTYPES[source.dtype].as_values(part)
    if values.dtype == np.float64 and DTYPES[wanted].bits == 16:
        values = narrowed(values)
    with np.errstate(over="ignore"):
        made = values.astype(DTYPES[wanted].values, copy=False)
    if not np.isfinite(made).all():
        raise OperationFailed(f"tensor {show(source.name)} holds a value that is not finite as {wanted}")
    return DTYPES[wanted].as_storage(made)

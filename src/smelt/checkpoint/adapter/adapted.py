"""A base with its adapters as one checkpoint: what is adapted is computed while it is read."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import InputRejected, show
from ...kernels.dtypes import DTYPES
from ...kernels.widen import widen
from ...storage import FileIdentity
from ..base import Checkpoint, Factors, TensorInfo
from .binding import Change, bind, unused
from .reading import Adapter
from .steps import Floats, Norms, Products, Step

#: Tensors whose factors are kept: as many as are read at once by many threads.
_KEPT = 32

#: Elements of a slab when a whole tensor is measured, in whole rows; part of the definition of the sums.
_SLAB = 1 << 19


class _Entry(NamedTuple):
    """What one adapter does to one tensor."""

    adapter: Adapter
    weight: float
    changes: Sequence[Change]

    @property
    def stored(self) -> TensorInfo | None:
        """The adapter's own tensor, where it replaces the base's before anything else is done."""
        return next((change.value for change in reversed(self.changes) if change.value is not None), None)

    @property
    def additive(self) -> bool:
        return all(change.additive for change in self.changes)


Chain = Sequence[Sequence[Step]]


class AdaptedCheckpoint(Checkpoint):
    """``base + sum weight (adapted by it alone - base)``; one adapter of weight 1 is applied as it is.

    What is adapted reads as float32, computed exactly but for its roundings, whatever run of elements is asked for;
    ``native`` of its :class:`TensorInfo` is the base's dtype. All else is the base's, in its own dtype. A tensor that
    an adapter stores whole reads as stored there.

    Raises InputRejected for adapters that do not fit the base: names, shapes, or several that replace a tensor by
    one of another shape.
    """

    def __init__(self, base: Checkpoint, adapters: Sequence[tuple[Adapter, float]], label: str) -> None:
        self.label, self.base = label, base
        self.config, self.folder, self.metadata = base.config, base.folder, base.metadata
        self.parts, self.beside = base.parts, base.beside
        self._adapters = [adapter for adapter, _ in adapters]
        self.scratch = max(source.scratch for source in self._sources())
        revisions = [source.revision for source in self._sources()]
        self.revision = None if None in revisions else "+".join(map(str, revisions))
        self._entries: dict[str, list[_Entry]] = {}
        for adapter, weight in adapters:
            for name, changes in bind(adapter, base).items():
                self._entries.setdefault(name, []).append(_Entry(adapter, weight, changes))
        adapted = {name: self._described(name) for name in sorted(self._entries)}
        self.tensors: Mapping[str, TensorInfo] = dict(sorted({**base.tensors, **adapted}.items()))
        notices = (note for source in self._sources() for note in source.notices)
        self.notices: Sequence[str] = [
            *notices,
            *(note for adapter in self._adapters for note in unused(adapter, base)),
        ]
        self.held = base.held + sum(sorted(map(self._factor_bytes, self._entries), reverse=True)[:_KEPT])
        self._chains: OrderedDict[str, Chain] = OrderedDict()
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._guard = threading.Lock()
        self._stripped = False

    @property
    def side_files(self) -> Mapping[str, bytes]:
        return {} if self._stripped else self.base.side_files

    @property
    def unwritten(self) -> Sequence[str]:
        return () if self._stripped else self.base.unwritten

    def strip(self) -> None:
        super().strip()
        self._stripped = True

    def _described(self, name: str) -> TensorInfo:
        base, entries, whole = self.base.tensors.get(name), self._entries[name], self._whole(name)
        if whole is not None:
            return replace(whole, name=name, native=whole.dtype if base is None else base.native)
        shapes = {stored.shape for entry in entries if (stored := entry.stored) is not None}
        if base is not None and not (shapes and self._alone(name)):
            shapes.add(base.shape)
        if base is None or len(shapes) > 1:
            raise InputRejected(
                f"{self.label}: {show(name)} is stored whole by an adapter, and is no sum with what the others hold "
                f"({', '.join(str(list(shape)) for shape in sorted(shapes))}): give one adapter, of weight 1"
            )
        if not DTYPES[base.dtype].arithmetic:
            raise InputRejected(
                f"{self.label}: {show(name)} of the base is {base.dtype}, and cannot be adapted: dequantise it first"
            )
        return replace(base, dtype="F32", shape=shapes.pop())

    def _alone(self, name: str) -> bool:
        """Whether a single adapter changes it, as it is."""
        entries = self._entries[name]
        return len(entries) == 1 and entries[0].weight == 1

    def _whole(self, name: str) -> TensorInfo | None:
        """The adapter's tensor, where nothing is done but to replace the base's by it."""
        if name not in self._entries or not self._alone(name):
            return None
        entry = self._entries[name][0]
        return entry.stored if len(entry.changes) == 1 else None

    # --- values -------------------------------------------------------------------------------------------

    def read(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        whole = self._whole(name)
        if name not in self._entries:
            self.base.read(name, start, out)
        elif whole is not None:
            self._entries[name][0].adapter.file.read(whole.name, start, out)
        elif len(out):
            self._compute(name, start, out)

    def _compute(self, name: str, start: int, out: Floats) -> None:
        """Elements start .. start + len(out) of an adapted tensor."""
        entries, chain = self._entries[name], self._chain(name)
        if self._alone(name):
            self._begin(name, entries[0], start, out)
            _apply(chain[0], start, out)
            return
        self._read_floats(self.base, name, start, out)
        unchanged = out.copy()
        for entry, steps in zip(entries, chain, strict=True):
            if entry.additive:
                _apply(steps, start, out, entry.weight)
            else:
                alone = np.empty_like(out)
                self._begin(name, entry, start, alone)
                _apply(steps, start, alone)
                alone -= unchanged
                alone *= np.float32(entry.weight)
                out += alone

    def _begin(self, name: str, entry: _Entry, start: int, out: Floats) -> None:
        """What the steps work on: the base's values, or those that the adapter stores whole."""
        stored = entry.stored
        if stored is None:
            self._read_floats(self.base, name, start, out)
        else:
            self._read_floats(entry.adapter.file, stored.name, start, out)

    def _read_floats(self, source: Checkpoint, name: str, start: int, out: Floats) -> None:
        dtype = DTYPES[source.tensors[name].dtype]
        if dtype.code == "F32":
            source.read(name, start, out)
            return
        stored = np.empty(len(out), dtype.storage)
        source.read(name, start, stored)
        if dtype.code in ("BF16", "F16"):
            widen(stored, dtype.code, out)
        else:
            np.copyto(out, dtype.as_values(stored), casting="same_kind")

    def _chain(self, name: str) -> Chain:
        """The steps on a tensor by adapter, with their factors; made once while they are in use."""
        with self._guard:
            lock = self._locks[name]
        with lock:
            found = self._chains.get(name) or [self._steps(name, entry) for entry in self._entries[name]]
            with self._guard:
                self._chains[name] = found
                self._chains.move_to_end(name)
                if len(self._chains) > _KEPT:
                    self._chains.popitem(last=False)
        return found

    def _steps(self, name: str, entry: _Entry) -> list[Step]:
        steps: list[Step] = []
        for change in entry.changes:
            if change.make is not None:
                step = change.make()
                steps.append(step.measured(self._slabs(name, entry, steps)) if isinstance(step, Norms) else step)
        return steps

    def _slabs(self, name: str, entry: _Entry, steps: Sequence[Step]) -> Iterator[Floats]:
        """All values as they are after ``steps``, in whole rows."""
        shape = self.tensors[name].shape
        width, count = max(1, prod(shape[1:])), prod(shape)
        size = max(1, _SLAB // width) * width
        out = np.empty(min(size, count), np.float32)
        for start in range(0, count, size):
            part = out[: count - start]
            self._begin(name, entry, start, part)
            _apply(steps, start, part)
            yield part

    # --- structure ----------------------------------------------------------------------------------------

    def rank(self, name: str, base: Checkpoint) -> int | None:
        return self._rank(name) if _same(self.base, base, name) else None

    def _rank(self, name: str) -> int | None:
        """Of the sum of all changes, where each is a product."""
        if name not in self.base.tensors or not DTYPES[self.tensors[name].dtype].arithmetic:
            return None
        ranks = [change.rank for entry in self._entries.get(name, ()) for change in entry.changes]
        known = [rank for rank in ranks if rank is not None]
        return sum(known) if len(known) == len(ranks) else None

    def factors(self, name: str) -> Factors | None:
        shape, rank = self.tensors[name].shape, self._rank(name)
        if not rank:
            rows, columns = shape[0] if shape else 1, prod(shape[1:])
            nothing = Factors(np.empty((rows, 0), np.float32), np.empty((0, columns), np.float32), 1.0)
            return None if rank is None else nothing
        pairs = zip(self._entries[name], self._chain(name), strict=True)
        steps = [(entry.weight, step) for entry, steps in pairs for step in steps]
        return _joined([(weight * step.scale, step) for weight, step in steps if isinstance(step, Products)])

    def _factor_bytes(self, name: str) -> int:
        """What the products of a tensor take while they are kept."""
        shape = self.tensors[name].shape
        ranks = sum(change.rank or 0 for entry in self._entries[name] for change in entry.changes)
        return 4 * ranks * (shape[0] + prod(shape[1:])) if ranks else 0

    def files(self) -> list[FileIdentity]:
        found = {file.path: file for source in self._sources() for file in source.files()}
        return [found[path] for path in sorted(found)]

    def folders(self) -> list[Path]:
        return [folder for source in self._sources() for folder in source.folders()]

    def check_unchanged(self) -> None:
        for source in self._sources():
            source.check_unchanged()

    def close(self) -> None:
        for source in self._sources():
            source.close()

    def _sources(self) -> list[Checkpoint]:
        return [self.base, *(adapter.file for adapter in self._adapters)]


def _same(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Whether two checkpoints have a tensor from the same place of the same files, or are one."""
    if one is other:
        return True
    files = type(one) is type(other) and one.tensors.get(name) == other.tensors.get(name) and one.files()
    return bool(files) and files == other.files()


def _apply(steps: Sequence[Step], start: int, out: Floats, weight: float = 1.0) -> None:
    for step in steps:
        step.apply(start, out, weight)


def _joined(products: Sequence[tuple[float, Products]]) -> Factors:
    """One product for all: side by side, with the scales on the left where they differ."""
    if len(products) == 1:
        scale, product = products[0]
        return Factors(product.left[0], product.right[0], scale)
    left = np.concatenate([np.float32(scale) * product.left[0] for scale, product in products], axis=1)
    return Factors(left, np.concatenate([product.right[0] for _, product in products]), 1.0)

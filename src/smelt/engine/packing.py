"""Between the executor and the disk: tiles of float32 become FP8 codes and scales.

A scale is known when all elements that share it are. Blocks are gathered in bands of whole rows, in memory; what
has one scale waits in a scratch file. Nothing depends on the order in which tiles come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import OperationFailed, show
from ..kernels.float8 import encode, largest, scales_of
from .sink import DiskSink
from .spool import Spool, Spooled
from .tiles import TILE

if TYPE_CHECKING:
    from .float8 import Form

Floats = npt.NDArray[np.float32]
#: (first element, values, scales of the rows that they lie in): encodes and writes.
_Encode = Callable[[int, Floats, Floats], None]


class _Gatherer(Protocol):
    def add(self, start: int, values: Floats) -> None: ...


class PackingSink:
    """Encodes the tensors that have a form, and passes all others on. ``close()`` releases what waits."""

    def __init__(self, sink: DiskSink, forms: Mapping[str, Form], folder: Path) -> None:
        self.done = sink.done
        self._sink, self._forms, self._folder = sink, forms, folder
        self._gatherers: dict[str, _Gatherer] = {}
        self._beyond: dict[str, int] = {}
        self._open = ExitStack()
        self._lock = threading.Lock()

    def __enter__(self) -> PackingSink:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    @property
    def waiting(self) -> int:
        return self._sink.waiting

    def write(self, name: str, start: int, array: npt.NDArray[Any], release: Callable[[], None]) -> None:
        if name not in self._forms:
            self._sink.write(name, start, array, release)
            return
        with self._lock:
            gatherer = self._gatherers.get(name) or self._gatherers.setdefault(name, self._gatherer(name))
        gatherer.add(start, array)
        release()

    def finish(self, name: str) -> None:
        """What is encoded has no place in a journal: a run that goes on after a crash makes it again."""
        if name not in self._forms:
            self._sink.finish(name)
        self._gatherers.pop(name, None)

    def notices(self) -> Iterator[str]:
        """What the given scales were too small for."""
        if self._beyond:
            yield (
                f"output.scales: {sum(self._beyond.values())} values in {len(self._beyond)} tensors are larger than "
                f"the base's scales allow, and are cut to the largest code; the first is {show(min(self._beyond))}"
            )

    def _gatherer(self, name: str) -> _Gatherer:
        form = self._forms[name]
        given = None if form.given is None else form.given()
        if form.grid != (1, 1) or form.count <= TILE:
            return _Bands(self._writer(name), form, given)
        if given is not None:
            return _Known(self._writer(name), given)
        return _Waiting(self._writer(name), form, self._open.enter_context(ExitStack()), self._folder)

    def _writer(self, name: str) -> _Encode:
        form = self._forms[name]

        def write(start: int, values: Floats, scales: Floats) -> None:
            """Codes, and with the first of a row of blocks its scales."""
            codes = np.empty(len(values), np.uint8)
            columns, size = (form.columns, form.width) if len(scales) > 1 else (len(values), len(values))
            beyond, strange = encode(values, scales, columns, size, codes)
            self._note(name, beyond, strange)
            self._sink.write(name, start, codes, lambda: None)
            if start % (form.height * form.columns) == 0:
                row = start // (form.height * form.columns)
                self._sink.write(form.scale, row * len(scales), scales, lambda: None)

        return write

    def _note(self, name: str, beyond: int, strange: int) -> None:
        if strange:
            raise OperationFailed(f"tensor {show(name)} holds {strange} values that FP8 does not: NaN or Inf")
        if beyond:
            with self._lock:
                self._beyond[name] = self._beyond.get(name, 0) + beyond


class _Bands:
    """Gathers whole rows of blocks."""

    def __init__(self, encode: _Encode, form: Form, given: Floats | None) -> None:
        self._encode, self._form, self._given = encode, form, given
        self._size = form.height * form.columns
        self._open: dict[int, _Band] = {}
        self._lock = threading.Lock()

    def add(self, start: int, values: Floats) -> None:
        end = start + len(values)
        for band in range(start // self._size, -(-end // self._size)):
            first, last = max(start, band * self._size), min(end, (band + 1) * self._size)
            self._put(band, first - band * self._size, values[first - start : last - start])

    def _put(self, band: int, at: int, values: Floats) -> None:
        with self._lock:
            if band not in self._open:
                self._open[band] = _Band(min(self._size, self._form.count - band * self._size))
            held = self._open[band]
        held.values[at : at + len(values)] = values
        with self._lock:
            held.missing -= len(values)
            if held.missing:
                return
            del self._open[band]
        given, form = self._given, self._form
        scales = given[band] if given is not None else scales_of(largest(held.values, form.columns, form.width))
        self._encode(band * self._size, held.values, scales)


class _Band:
    def __init__(self, size: int) -> None:
        self.values, self.missing = np.empty(size, np.float32), size


class _Known:
    """One scale that is given: nothing has to wait."""

    def __init__(self, encode: _Encode, given: Floats) -> None:
        self._encode, self._scales = encode, given[0]

    def add(self, start: int, values: Floats) -> None:
        self._encode(start, values, self._scales)


class _Waiting:
    """One scale that depends on all values: they wait in a scratch file."""

    def __init__(self, encode: _Encode, form: Form, opened: ExitStack, folder: Path) -> None:
        self._encode, self._missing = encode, form.count
        self._opened, self._spool = opened, opened.enter_context(Spool(folder))
        self._parts: dict[int, Spooled] = {}
        self._largest = np.zeros(1, np.float32)
        self._lock = threading.Lock()

    def add(self, start: int, values: Floats) -> None:
        part, most = self._spool.put(values), largest(values, min(len(values), 4096), 4096).max()
        with self._lock:
            self._parts[start] = part
            self._largest = np.maximum(self._largest, most)
            self._missing -= len(values)
            if self._missing:
                return
        self._finish()

    def _finish(self) -> None:
        scales = scales_of(self._largest)
        for start, part in sorted(self._parts.items()):
            values = np.empty(part.count, np.float32)
            part.read(0, values)
            self._encode(start, values, scales)
        self._opened.close()

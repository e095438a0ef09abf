"""The frame of everything that makes an adapter: its modules, many at once, and a folder of what came out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from ..checkpoint import ADAPTER, TensorInfo, plan_file
from ..engine.artefact import Work, publish
from ..engine.execute import usable_cores
from ..engine.options import BASELINE
from ..engine.progress import Progress, Silent
from ..engine.spool import Spool
from ..errors import InputRejected
from ..kernels.program import Operand
from ..recipe import parse_size
from .lowrank import Array
from .outlook import AdapterPlan, Outlook
from .pool import Named, at_once, for_each
from .report import AdapterArtifact, ModuleReport

U = TypeVar("U", bound=Named)
R = TypeVar("R")


@dataclass
class Part:
    """One module's share of the result: its report, and its tensors by their names in the file."""

    report: ModuleReport
    tensors: dict[str, Operand] = field(default_factory=dict)


@dataclass(frozen=True)
class Means:
    """What a run may use."""

    threads: int
    memory: int
    progress: Progress

    @classmethod
    def of(cls, threads: int | None, memory: str | int, progress: Progress | None) -> Means:
        return cls(threads or usable_cores(), parse_size(memory), progress or Silent())


class Maker(ABC, Generic[U]):
    """Makes the part of each of its ``units`` (modules, or tensors), which are sorted by name, and a folder of them.

    ``label`` tells the progress what is done to them.
    """

    label: str
    units: Sequence[U]

    def __init__(self, work: Work) -> None:
        self.work = work
        self._spool: Spool | None = None

    @abstractmethod
    def memory(self, unit: U) -> int:
        """Bytes that making its part takes."""

    @abstractmethod
    def nbytes(self, unit: U) -> int:
        """What it counts for in the progress."""

    @abstractmethod
    def part(self, unit: U) -> Part: ...

    @abstractmethod
    def files(self, title: str, parts: Sequence[Part], tensors: Mapping[str, Operand]) -> Mapping[str, bytes]:
        """What is written beside the weights."""

    @abstractmethod
    def emptiness(self) -> str:
        """Why there is nothing to write, where no part holds a tensor."""

    @abstractmethod
    def outlook(self, unit: U) -> Outlook:
        """What will be stored of it, at most."""

    @abstractmethod
    def reads(self, unit: U) -> int:
        """Bytes of the inputs that its part is made of."""

    def held(self) -> int:
        """Memory that is taken from :meth:`prepare` to the end."""
        return 0

    def prepare(self, means: Means) -> None:
        """What has to be known before any part is made."""

    def whole(self) -> Mapping[str, Operand]:
        """Tensors that belong to no part."""
        return {}

    def copied(self) -> int:
        """Bytes of them."""
        return 0

    def each(self, make: Callable[[U], R], label: str, means: Means) -> list[R]:
        """``make`` of every unit, in order, many at once."""
        return for_each(
            self.units, make, needs=self.memory, nbytes=self.nbytes, threads=means.threads, memory=means.memory,
            progress=means.progress, label=label,
        )  # fmt: skip

    def keep(self, array: Array) -> Operand:
        """An array that waits for its place in the output."""
        assert self._spool is not None
        return self._spool.put(array)

    def plan(self, means: Means) -> AdapterPlan:
        """What :meth:`make` would do; nothing is read but headers."""
        needs = {unit.name: self.memory(unit) for unit in self.units}
        workers = at_once(needs, means.threads, means.memory)
        modules = [self.outlook(unit) for unit in self.units]
        inputs, copied = [item.label for item in self.work.inputs], self.copied()
        written = sum(module.nbytes for module in modules) + copied
        return AdapterPlan(
            inputs=inputs, bytes_read=sum(map(self.reads, self.units)) + copied * len(inputs),
            bytes_written=written, disk_needed=written + sum(module.computed for module in modules) + (1 << 20),
            peak_memory=BASELINE + self.held() + sum(sorted(needs.values())[-workers:]), threads=workers,
            notices=list(self.work.notices), modules=modules,
        )  # fmt: skip

    def make(self, out: Path, means: Means) -> AdapterArtifact:
        """Publish everything that has a part, in one file, with its description."""
        with Spool(out.absolute().parent) as self._spool:
            self.prepare(means)
            parts = self.each(self.part, self.label, means)
            tensors = {name: operand for part in parts for name, operand in part.tensors.items()}
            if not tensors:
                raise InputRejected(self.emptiness())
            tensors |= self.whole()
            files = self.files(out.name, parts, tensors)
            shard = plan_file(ADAPTER, [TensorInfo(name, o.dtype, o.shape) for name, o in sorted(tensors.items())])
            done = publish(
                out, self.work, tensors, files, shards=[shard], threads=means.threads, progress=means.progress
            )
        return AdapterArtifact(**vars(done), modules=[part.report for part in parts])

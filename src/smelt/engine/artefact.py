"""What workflows that make a checkpoint have in common: open models, and publish what was made of them.

A workflow computes some tensors, copies the others, and hands all of them over as operands; the folder then
appears whole, with its manifest, as a merge's does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import storage
from ..checkpoint import Shard, load
from ..errors import InputRejected
from ..kernels.program import Copy, Operand
from ..recipe import ModelReference, Position
from .card import without_paths
from .device import mapper_for
from .execute import Executor, usable_cores
from .inputs import Input, identity, quantised
from .jobs import Job
from .manifest import NAME, dump, manifest, sums_of
from .operands import CheckpointOperand, Ledger
from .progress import Progress, Silent
from .publish import check_destination, check_space, staging, write_files
from .run import Artifact
from .sink import DiskSink, write_tensors

Source = str | Path | Mapping[str, Any]


def open_model(source: Source, label: str = "arrays", *, allow_pickle: bool = False) -> Input:
    """A model by path, hub id, URL or dict of arrays (which is called ``label``), opened; no quantised one."""
    checkpoint = load(source, label=label if isinstance(source, Mapping) else None, allow_pickle=allow_pickle)
    opened = Input(ModelReference(checkpoint.label, checkpoint.label, Position(checkpoint.label)), checkpoint)
    InputRejected.gather(quantised(opened))
    return opened


def open_models(allow_pickle: bool, **sources: Source) -> list[Input]:
    """Models by what to call them where they are arrays."""
    return [open_model(source, label, allow_pickle=allow_pickle) for label, source in sources.items()]


@dataclass
class Work:
    """What a workflow was asked to do, as its manifest tells it: its name, settings, seed and inputs."""

    name: str
    settings: Mapping[str, Any]
    inputs: Sequence[Input]
    seed: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    notices: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def operand(self, item: Input, name: str) -> CheckpointOperand:
        """A tensor of one of the inputs, fingerprinted when it is read."""
        return item.operand(name, self.ledger)

    def folders(self) -> list[Path]:
        return [item.checkpoint.folder for item in self.inputs if item.checkpoint.folder is not None]

    def public(self, text: str) -> str:
        """``text`` without the folders that local models lie in."""
        return without_paths(text, [item.label for item in self.inputs if item.is_local])

    @property
    def bytes_read(self) -> int:
        """Of the inputs' tensors, each counted once."""
        tensors = [(item.checkpoint, name) for item in self.inputs for name in self.ledger.names(item.label)]
        return sum(checkpoint.tensors[name].nbytes for checkpoint, name in tensors)

    @contextmanager
    def towards(self, out: Path) -> Iterator[None]:
        """With a destination that will do; afterwards the inputs are closed."""
        try:
            check_destination(out, self.folders())
            yield
        finally:
            self.close()

    def close(self) -> None:
        for item in self.inputs:
            item.checkpoint.close()


def publish(
    out: Path, work: Work, tensors: Mapping[str, Operand], files: Mapping[str, bytes], *, shards: Sequence[Shard],
    threads: int | None = None, progress: Progress | None = None,
) -> Artifact:  # fmt: skip
    """Write every operand under its name, in the dtype that ``shards`` says, the files and the manifest.

    ``out`` was looked at by :func:`check_destination` before the work began.
    """
    dtypes = {tensor.name: tensor.dtype for shard in shards for tensor in shard.tensors}
    written = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    check_space(out, sum(shard.size for shard in shards) + sum(map(len, files.values())) + (1 << 20))

    def copy_all(sink: DiskSink) -> None:
        mapper = mapper_for("cpu", "error", work.notices.append)
        with Executor(sink, mapper, threads=threads or usable_cores(), progress=progress) as executor:
            executor.run(_copy(name, dtypes[name], operand) for name, operand in tensors.items())

    shown = progress or Silent()
    shown.start(2 * written, "writing")
    try:
        with staging(out) as folder:
            digests = write_tensors(folder, shards, copy_all)
            for item in work.inputs:
                item.checkpoint.check_unchanged()
            write_files(folder, files)
            storage.write_small(folder / NAME, dump(_manifest(work, digests, sums_of(folder, files))))
    finally:
        shown.finish()
    seconds = time.monotonic() - work.started
    return Artifact(out, len(tensors), work.bytes_read, written, seconds, work.notices)


def _copy(name: str, dtype: str, operand: Operand) -> Job:
    return Job(name, dtype, operand.count, [operand], lambda: Copy(operand))


def _manifest(work: Work, tensors: Mapping[str, Mapping[str, Any]], files: Mapping[str, str]) -> dict[str, Any]:
    return manifest(
        recipe=work.public(json.dumps(work.settings, indent=2, ensure_ascii=False)), method=work.name, variant="",
        seed=work.seed, inputs=[identity(item, work.ledger) for item in work.inputs], statistics=[],
        tensors=tensors, files=files,
        notices=[work.public(notice) for notice in work.notices],
    )  # fmt: skip

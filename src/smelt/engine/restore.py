"""One task's model, put together from the base and a result in parts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import storage
from ..checkpoint import Checkpoint, TensorInfo, load, plan_shards
from ..errors import InputRejected, show
from ..kernels.program import Call, Copy, Mask, Whole, call
from ..methods.parts import added, expanded, restored
from ..methods.tensors import identity
from .device import mapper_for
from .execute import Executor, usable_cores
from .inputs import read_config
from .jobs import Job, Sink
from .manifest import NAME, dump, manifest, sums_of
from .memory import ArraySink
from .operands import CheckpointOperand
from .options import SHARD_SIZE
from .publish import check_destination, check_space, staging, write_files
from .side_files import side_files
from .sink import write_tensors


def restore_task(
    parts: str | Path | Mapping[str, Any], base: str | Path | Mapping[str, Any], task: int,
    out: str | Path | None = None, *, threads: int | None = None,
) -> Any:  # fmt: skip
    """The model of one task: base + rescale * mask * unified, or base + its own factors, tensor by tensor.

    Parameters
    ----------
    parts: what ``merge_tensors(..., parts=True)`` returned, or the folder that ``output: {format: parts}`` wrote.
    base: the base model's tensors, or its folder.
    task: the number of the task, from 0.
    out: a folder to write: whole, or not at all; config and tokenizer are the base's.

    Returns name -> array with the base's names, shapes and dtypes, or the path of the folder. It is what a merge with
    ``task`` gives, but for the rounding of a vector that was stored in a narrower type. Raises InputRejected where
    the two do not fit together.
    """
    with load(parts, label="parts") as made, load(base, label="base") as origin:
        InputRejected.gather(_problems(made, origin, task))
        jobs = [_job(made, origin, name, task) for name in origin.tensors]
        if out is not None:
            return _write(made, origin, task, Path(out), jobs, threads)
        sink = ArraySink()
        for job in jobs:
            sink.expect(job.name, job.dtype, origin.tensors[job.name].shape)
        _run(jobs, sink, threads)
        return sink.values(getattr(origin, "kind", "numpy"))


def _run(jobs: Sequence[Job], sink: Sink, threads: int | None) -> None:
    mapper = mapper_for("cpu", "error", lambda message: None)
    with Executor(sink, mapper, threads=threads or usable_cores()) as executor:
        executor.run(jobs)


def _write(made: Checkpoint, base: Checkpoint, task: int, out: Path, jobs: Sequence[Job], threads: int | None) -> Path:
    check_destination(out, [checkpoint.folder for checkpoint in (made, base) if checkpoint.folder is not None])
    tensors = [TensorInfo(job.name, job.dtype, base.tensors[job.name].shape) for job in jobs]
    check_space(out, sum(info.nbytes for info in tensors))
    config = read_config(base)
    files = {**side_files(base), **({} if config is None else {"config.json": config})}
    with staging(out) as folder:
        written = write_tensors(
            folder, plan_shards(tensors, SHARD_SIZE, parts=base.parts), lambda sink: _run(jobs, sink, threads)
        )
        write_files(folder, files)
        content = manifest(
            recipe=f"restore_task(task={task})", method="restore_task", variant="paper", seed=0,
            inputs=[], statistics=[], tensors=written, files=sums_of(folder, files), notices=[],
        )  # fmt: skip
        storage.write_small(folder / NAME, dump(content))
    return out


class Unpacked:
    """Packed bits as an operand: one byte per element, 1 where the bit is set."""

    dtype = "U8"

    def __init__(self, packed: CheckpointOperand, shape: tuple[int, ...], count: int) -> None:
        self.shape, self.count, self.label = shape, count, packed.label
        self._packed = packed

    def read(self, start: int, out: npt.NDArray[Any]) -> None:
        first, last = start // 8, -(-(start + len(out)) // 8)
        packed = np.empty(last - first, np.uint8)
        self._packed.read(first, packed)
        out[:] = np.unpackbits(packed)[start - 8 * first :][: len(out)]


def _job(made: Checkpoint, base: Checkpoint, name: str, task: int) -> Job:
    origin = CheckpointOperand(base, name)
    output = _output(made, origin, name, task)
    return Job(name, origin.dtype, origin.count, [origin], partial(identity, output))


def _output(made: Checkpoint, origin: CheckpointOperand, name: str, task: int) -> Call | Copy | Whole:
    if f"own.{task}/{name}" in made:
        return Copy(CheckpointOperand(made, f"own.{task}/{name}"))
    if f"factors.{task}/{name}" in made:
        return Whole(expanded, {"base": origin, "factors": CheckpointOperand(made, f"factors.{task}/{name}")})
    if f"delta.{task}/{name}" in made:
        return call(added, base=origin, vector=CheckpointOperand(made, f"delta.{task}/{name}"))
    if f"unified/{name}" not in made:
        return Copy(origin)
    bits = Unpacked(CheckpointOperand(made, f"mask.{task}/{name}"), origin.shape, origin.count)
    scale = f"rescale.{task}/{name}"
    return call(
        restored, base=origin, vector=CheckpointOperand(made, f"unified/{name}"), keep=Mask(bits),
        scale=float(made[scale]) if scale in made else 1.0,
    )  # fmt: skip


def _problems(made: Checkpoint, base: Checkpoint, task: int) -> list[str]:
    """Names and shapes that do not fit, or a task that is not there."""
    tasks = sorted({int(found[1]) for name in made if (found := re.match(r"(?:mask|factors|delta)\.(\d+)/", name))})
    if task not in tasks:
        return [f"{made.label}: no parts of task {task}, there are those of {', '.join(map(str, tasks)) or 'none'}"]
    return [*_wrong_factors(made, base, task), *_wrong_vectors(made, base, task)]


def _wrong_factors(made: Checkpoint, base: Checkpoint, task: int) -> list[str]:
    found = {name: base.tensors.get(name.partition("/")[2]) for name in made if name.startswith(f"factors.{task}/")}
    return [
        f"tensor {show(name)} in {made.label} is {list(made.tensors[name].shape)}, which are no factors of what "
        f"{base.label} has ({list(known.shape) if known else 'no such tensor'}): these parts belong to another base"
        for name, known in found.items()
        if known is None or len(known.shape) != 2 or made.tensors[name].shape[1:] != (sum(known.shape) + 1,)
    ]


def _wrong_vectors(made: Checkpoint, base: Checkpoint, task: int) -> list[str]:
    vectors = [name for name in made if name.startswith(("unified/", f"own.{task}/", f"delta.{task}/"))]
    shapes = {name: (made.tensors[name].shape, base.tensors.get(name.partition("/")[2])) for name in vectors}
    return [
        f"tensor {show(name)} in {made.label} is {list(shape)}, {base.label} has "
        f"{list(known.shape) if known else 'no such tensor'}: these parts belong to another base"
        for name, (shape, known) in shapes.items()
        if known is None or known.shape != shape
    ]

"""Go over the tensors that all models share, and sum up their task vectors by layer and in all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ..checkpoint import Checkpoint
from ..engine.progress import Progress
from ..kernels.dtypes import DTYPES
from .sampling import Sample, Sampling, read_rows
from .vectors import TaskVectors

#: More would wait for the interpreter's lock: numpy holds it between its calls.
_THREADS = min(4, os.cpu_count() or 1)


@dataclass
class Survey:
    """Task vectors of ``models`` against ``base``: of everything, and of each layer in order of depth."""

    base: str
    models: tuple[str, ...]
    total: TaskVectors
    layers: dict[str, TaskVectors] = field(default_factory=dict)
    tensors: int = 0

    @property
    def share_read(self) -> float:
        """The part of the elements that was looked at."""
        return self.total.read / self.total.elements if self.total.elements else 0.0

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return [(i, j) for i in range(len(self.models)) for j in range(i + 1, len(self.models))]


def survey(
    models: Sequence[Checkpoint],
    base: Checkpoint,
    groups: Mapping[str, str],
    sample: Sample,
    progress: Progress,
) -> Survey:
    """Read the tensors named by ``groups`` (tensor -> layer, in order of depth) and sum them up.

    Memory: a run of at most 65 536 elements per thread and model, and 33 KB per layer and model.
    """
    everyone = [base, *models]
    result = Survey(base.label, tuple(model.label for model in models), TaskVectors.none(len(models)))
    if not groups:
        return result
    sampling = Sampling.of(sample, [base.tensors[name] for name in groups])
    progress.start(_bytes_to_read(everyone, groups, sampling), "checking")
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="smelt-check") as pool:
        for name, vectors in zip(groups, pool.map(_task(everyone, sampling, progress), groups), strict=True):
            result.layers.setdefault(groups[name], TaskVectors.none(len(models))).add(vectors)
            result.total.add(vectors)
            result.tensors += 1
    progress.finish()
    return result


def _task(everyone: Sequence[Checkpoint], sampling: Sampling, progress: Progress) -> Callable[[str], TaskVectors]:
    def run(name: str) -> TaskVectors:
        vectors = TaskVectors.none(len(everyone) - 1)
        for rows in read_rows(everyone, name, sampling):
            vectors.add_elements(rows)
            progress.advance(sum(_width(checkpoint, name) for checkpoint in everyone) * len(rows[0]))
        vectors.scale_to(everyone[0].tensors[name].count)
        return vectors

    return run


def _bytes_to_read(everyone: Sequence[Checkpoint], names: Mapping[str, str], sampling: Sampling) -> int:
    elements = {name: sampling.elements(everyone[0].tensors[name].count) for name in names}
    return sum(elements[name] * _width(checkpoint, name) for name in names for checkpoint in everyone)


def _width(checkpoint: Checkpoint, name: str) -> int:
    """Bytes per element."""
    return DTYPES[checkpoint.tensors[name].dtype].bits // 8

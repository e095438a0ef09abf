"""The same methods on dicts of arrays: numpy in, numpy out; torch in, torch out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..architecture import Structure
from ..checkpoint import Checkpoint, load
from ..errors import InputRejected, UsageError, show
from ..kernels.dtypes import DTYPES, NAMES
from ..kernels.program import Copy, Output
from ..methods import Method, Model, Statistic, Tensor, get
from ..methods.lines import wrapped
from ..methods.tensors import identity
from .changes import with_ranks
from .device import Policy, mapper_for
from .execute import Executor, usable_cores
from .gradients import lost, merge_live, numbers, remembered, remembering
from .jobs import Job, Steps
from .live import arrays_of, ties
from .operands import CheckpointOperand
from .parameters import check_counts, constant_parameters, lines_of
from .parts import own_parts, parts_of
from .statistics import Finder, Member, Statistics
from .types import common_dtype

Arrays = Mapping[str, Any]


def merge_tensors(
    method: str,
    models: Sequence[Any],
    base: Any = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    per_model: Mapping[str, Sequence[Any]] | None = None,
    statistics: Sequence[Mapping[str, Arrays]] | None = None,
    masks: Sequence[Arrays] | None = None,
    seed: int = 0,
    dtype: str | None = None,
    tied: Mapping[str, str] | None = None,
    parts: bool = False,
    lines: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    on_nonfinite: Policy = "error",
    on_extra: Literal["error", "copy"] = "error",
    differentiable: bool = False,
) -> dict[str, Any]:
    """Merge dicts of arrays, or live models, by the method called ``method``.

    Parameters
    ----------
    models: one dict per model, name -> array, or a ``torch.nn.Module``, which stands for its ``state_dict()``;
        without the base where the method has one.
    base: the base model's dict or module, for methods that need one.
    parameters, per_model: values by name; a per-model parameter takes one value per model, or one for all.
    statistics: one dict per model, kind -> {tensor name -> array} (Fisher, Gram, ...); one in all for kinds that
        serve all models.
    masks: one dict per model, tensor name -> array of 0 and 1 (1 = kept), instead of random draws.
    seed: names the random draws.
    dtype: of the output ("bfloat16", ...); default: the inputs' common type per tensor.
    tied: alias -> owner, for names that repeat another tensor: merged (and counted) once. Torch tensors that
        share their memory in every model are found to be tied without being told.
    parts: for methods whose result is more than one model: what every task's model is made of, as
        "unified/<tensor>", "mask.<task>/<tensor>" (packed bits), "rescale.<task>/<tensor>" and, for excluded
        tensors, "own.<task>/<tensor>". :func:`smelt.restore_task` puts them together.
    lines: scale the merged task vector by layer (LiNeS): beta, and where wished alpha, norm, outside.
    config: the models' config.json, for methods that ask which layer a tensor belongs to; without it the
        layers are told from the names.
    device: "cpu", or a torch device such as "cuda".
    on_extra: what becomes of a tensor that only some models have: "error", or "copy" from the first that has it.
    differentiable: let gradients flow from the result to the models' torch tensors and to parameters given as
        torch scalars (per model: a sequence of them, or a vector). They flow through the element formula;
        statistics (norms, thresholds, random draws) count as constant. Methods on whole matrices refuse it.

    Returns the merged dict, of the kind of array that ``models[0]`` holds, which a module's ``load_state_dict``
    takes. Names that are tied hold one tensor.

    Raises UsageError for wrong parameters, InputRejected for tensors that do not fit together,
    OperationFailed when NaN or Inf is met (``on_nonfinite="warn"`` or ``"allow"`` lets it pass).
    """
    chosen = get(method)
    if lines is not None:
        UsageError.gather(["lines has no effect on the parts of a result"] if parts else [])
        chosen = wrapped(chosen, lines_of(lines, len(models)))
    UsageError.gather(["parts are not differentiable: merge, or ask for one task"] if parts and differentiable else [])
    given, each_given = dict(parameters or {}), {name: list(values) for name, values in (per_model or {}).items()}
    shared, each = constant_parameters(chosen, numbers(given), numbers(each_given), len(models), parts)
    UsageError.gather(check_counts(chosen, len(models), base is not None))
    inputs = _Inputs(chosen, models, base, statistics, masks, tied or {}, config or {}, on_extra)
    tensors = [inputs.tensor(name, shared, each, seed) for name in inputs.merged(shared)]
    inputs.check_statistics()
    chosen.check_layers(tensors)
    sink = ArraySink()
    mapper = mapper_for(device, on_nonfinite, _warn)
    with Executor(sink, mapper, threads=threads or usable_cores()) as executor:
        tensors = _survey(chosen, tensors, executor)
        if differentiable:
            shared, each = remembering(shared, given), remembering(each, given | each_given)
            live = [replace(tensor, shared=shared, each=each) for tensor in tensors]
            return inputs.merged_live(chosen, live, dtype, executor, on_nonfinite, shared.get("task"))
        if parts:
            executor.run(inputs.part_jobs(chosen, tensors, dtype, sink))
        else:
            executor.run(inputs.jobs(chosen, tensors, dtype, sink, shared.get("task")))
    return inputs.like_the_input(sink, parts)


def _survey(method: Method, tensors: list[Tensor], executor: Executor) -> list[Tensor]:
    """Give every tensor what the method knows of the whole model."""
    if method.survey is None or not tensors:
        return tensors
    known = executor.survey(method.survey(Model(tuple(tensors))))
    return [replace(tensor, survey=known) for tensor in tensors]


def _warn(message: str) -> None:
    import warnings

    warnings.warn(message, RuntimeWarning, stacklevel=2)


class ArraySink:
    """Collects output tensors in memory, as stored."""

    waiting = 0

    def __init__(self) -> None:
        self.arrays: dict[str, tuple[str, tuple[int, ...], npt.NDArray[Any]]] = {}

    def expect(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self.arrays[name] = (dtype, shape, np.empty(int(np.prod(shape)), DTYPES[dtype].storage))

    def write(self, name: str, start: int, array: npt.NDArray[Any], release: Callable[[], None]) -> None:
        self.arrays[name][2][start : start + len(array)] = array
        release()

    def finish(self, name: str) -> None:
        pass

    def values(self, library: str) -> dict[str, Any]:
        """Everything that was written, as arrays of numpy or torch."""
        return {name: _as_kind(library, *stored) for name, stored in self.arrays.items()}


class _Inputs:
    """The dicts as checkpoints, and which of their tensors are merged, copied or shared."""

    def __init__(
        self, method: Method, models: Sequence[Any], base: Any,
        statistics: Sequence[Mapping[str, Arrays]] | None, masks: Sequence[Arrays] | None, tied: Mapping[str, str],
        config: Mapping[str, Any], on_extra: str,
    ) -> None:  # fmt: skip
        self._method = method
        self._live: dict[int, Arrays] = {}
        self._models = [self._opened(model, f"model {i}") for i, model in enumerate(models)]
        self._base = None if base is None else self._opened(base, "base")
        self._statistics = _given_statistics(statistics or (), method, len(models))
        self._finder = Finder(method)
        self._masks = [load(arrays, label=f"mask of model {i}") for i, arrays in enumerate(masks or ())]
        self._everything = [*([self._base] if self._base is not None else []), *self._models]
        self.names = self._common_names(on_extra)
        self._extra = frozenset(name for name in self.names if any(name not in c for c in self._everything))
        self._aliases = {alias: owner for alias, owner in {**self._ties(), **tied}.items() if alias != owner}
        shapes = {name: info.shape for name, info in self._everything[0].tensors.items()} if self._everything else {}
        self._roles = Structure.of(shapes, config) if config else Structure.by_names(shapes)

    def _opened(self, model: Any, label: str) -> Checkpoint:
        """A dict, a module or an opened checkpoint; the live arrays of the first two are remembered."""
        arrays = arrays_of(model)
        checkpoint = load(arrays, label=label)
        self._live[id(checkpoint)] = {} if isinstance(arrays, Checkpoint) else arrays
        return checkpoint

    def _common_names(self, on_extra: str) -> list[str]:
        """All names, after checking that inputs agree on shapes, and unless extra ones are copied on names."""
        names = sorted(set().union(*self._everything))
        problems = []
        for name in names:
            missing = [checkpoint.label for checkpoint in self._everything if name not in checkpoint]
            shapes = {c.label: c.tensors[name].shape for c in self._everything if name in c}
            if missing and on_extra == "error":
                problems.append(f"tensor {show(name)} is missing in {', '.join(missing)}")
            elif len(set(shapes.values())) > 1:
                problems.append(f"tensor {show(name)}: shapes differ: {shapes}")
        InputRejected.gather(problems)
        return names

    def _ties(self) -> dict[str, str]:
        return ties([self._live[id(checkpoint)] for checkpoint in self._everything], self.names)

    def merged(self, shared: Mapping[str, Any]) -> list[str]:
        """The tensors that the method sees: floating, not excluded, not an alias."""
        patterns = [re.compile(pattern) for pattern in shared.get("exclude", ())]
        excluded = {name for name in self.names if any(pattern.match(name) for pattern in patterns)}
        left = excluded | self._extra | set(self._aliases)
        return [name for name in self.names if name not in left and self._floating(name)]

    def _floating(self, name: str) -> bool:
        return all(
            DTYPES[checkpoint.tensors[name].dtype].arithmetic for checkpoint in self._everything if name in checkpoint
        )

    def tensor(self, name: str, shared: Mapping[str, Any], each: Mapping[str, Any], seed: int) -> Tensor:
        masks = tuple(CheckpointOperand(mask, name) for mask in self._masks if name in mask)
        tensor = Tensor(
            name=name,
            base=None if self._base is None else CheckpointOperand(self._base, name),
            models=tuple(CheckpointOperand(model, name) for model in self._models),
            shared=shared,
            each=each,
            seed=seed,
            statistics=self._finder.of(
                name, self._everything[0].tensors[name].shape, shared,
                [Member(f"model {i}", name, given) for i, given in enumerate(self._statistics)],
            ),
            masks=masks or None,
            role=self._roles.get(name),
        )  # fmt: skip
        return with_ranks(self._method, tensor)

    def check_statistics(self) -> None:
        """Raise what is missing, does not fit or has no effect."""
        UsageError.gather(self._finder.usage_problems())
        InputRejected.gather(self._finder.problems())

    def jobs(
        self, method: Method, tensors: list[Tensor], dtype: str | None, sink: ArraySink, task: int | None
    ) -> list[Job]:
        """One job per output tensor: merged by the method, or copied."""
        jobs = []
        merged = {tensor.name: tensor for tensor in tensors}
        for name, sources in self._sources():
            code = _output_dtype([source.native for source in sources], dtype)
            sink.expect(name, code, sources[0].shape)
            jobs.append(Job(name, code, sources[0].count, sources, self._begin(name, merged.get(name), method, task)))
        return jobs

    def part_jobs(self, method: Method, tensors: list[Tensor], dtype: str | None, sink: ArraySink) -> list[Job]:
        """One job per part of each merged tensor, and for excluded ones one per model."""
        jobs = []
        merged = {tensor.name: tensor for tensor in tensors}
        for name, sources in self._sources():
            if name in self._extra:
                continue
            code = _output_dtype([source.native for source in sources], dtype)
            models = sources[-len(self._models) :] if self._floating(name) else []
            parts = parts_of(method, merged[name], code) if name in merged else own_parts(name, models, code)
            for part in parts:
                sink.expect(part.name, part.dtype, part.shape)
                jobs.append(Job(part.name, part.dtype, sources[0].count, sources, partial(identity, part.output)))
        return jobs

    def _sources(self) -> Iterator[tuple[str, list[CheckpointOperand]]]:
        """Each tensor that is no alias, with its operands: the base's first, then the models'."""
        for name in self.names:
            if name not in self._aliases:
                yield name, [CheckpointOperand(c, name) for c in self._everything if name in c]

    def _begin(
        self, name: str, tensor: Tensor | None, method: Method, task: int | None
    ) -> Callable[[], Steps | Output]:
        if tensor is not None:
            return lambda: method.merge(tensor)
        if name in self._extra:
            return partial(Copy, next(CheckpointOperand(c, name) for c in self._everything if name in c))
        kept = method.keeper(len(self._models), task) if self._floating(name) else None
        return partial(Copy, CheckpointOperand(self._everything[0] if kept is None else self._models[kept], name))

    def merged_live(
        self, method: Method, tensors: list[Tensor], dtype: str | None, executor: Executor, policy: Policy,
        task: int | None,
    ) -> dict[str, Any]:  # fmt: skip
        """Every output tensor as a function of the live inputs."""
        merged = {tensor.name: tensor for tensor in tensors}
        values: dict[str, Any] = {}
        reached: frozenset[str] = frozenset()
        for name, sources in self._sources():
            code = _output_dtype([source.native for source in sources], dtype)
            begin = self._begin(name, merged.get(name), method, task)
            values[name], more = merge_live(begin, sources[0], executor, self._live_tensor, code, policy)
            reached |= more
        given = remembered(value for t in tensors for each in (t.shared, t.each) for value in each.values())
        if given - reached:
            raise UsageError(lost(given - reached))
        values.update({alias: values[owner] for alias, owner in self._aliases.items()})
        return dict(sorted(values.items()))

    def _live_tensor(self, operand: Any) -> Any:
        """The torch tensor that an operand reads, or None."""
        arrays = self._live.get(id(getattr(operand, "checkpoint", None)), {})
        array = arrays.get(getattr(operand, "name", ""))
        return array if hasattr(array, "requires_grad") else None

    def like_the_input(self, sink: ArraySink, parts: bool) -> dict[str, Any]:
        """The stored arrays as values, of the caller's kind, aliases included."""
        values = sink.values(getattr(self._models[0] if self._models else self._base, "kind", "numpy"))
        for name in list(values):
            kind, slash, tensor = name.partition("/") if parts else ("", "", name)
            aliases = [alias for alias, owner in self._aliases.items() if owner == tensor]
            values.update({f"{kind}{slash}{alias}": values[name] for alias in aliases})
        return dict(sorted(values.items()))


def _given_statistics(given: Sequence[Mapping[str, Arrays]], method: Method, models: int) -> list[Statistics | None]:
    """One checkpoint per model, None where there is none; kinds that no method knows are errors."""
    known = {kind for statistic in method.statistics for kind in _kinds(statistic)}
    unknown = sorted({kind for kinds in given for kind in kinds} - known)
    problems = [f"{method.name} uses no statistics of kind {kind!r}" for kind in unknown]
    if len(given) > models:
        problems.append(f"statistics: {len(given)} dicts for {models} models")
    UsageError.gather(problems)
    flat = [{f"{kind}/{name}": a for kind, arrays in kinds.items() for name, a in arrays.items()} for kinds in given]
    loaded = [Statistics(load(a, label=f"statistics of model {i}")) if a else None for i, a in enumerate(flat)]
    return loaded + [None] * (models - len(loaded))


def _kinds(statistic: Statistic) -> Iterator[str]:
    for kind in (statistic.kind, *statistic.also):
        yield from (kind, f"{kind}_row", f"{kind}_col") if statistic.factored else (kind,)


def _as_kind(kind: str, dtype: str, shape: tuple[int, ...], stored: npt.NDArray[Any]) -> Any:
    if kind == "torch":
        import torch

        return torch.from_numpy(stored).view(getattr(torch, DTYPES[dtype].value_type)).reshape(shape)
    return DTYPES[dtype].as_values(stored).reshape(shape)


def _output_dtype(codes: list[str], wanted: str | None) -> str:
    if not DTYPES[codes[0]].arithmetic:
        return codes[0]
    return common_dtype(codes) if wanted is None else NAMES[wanted]

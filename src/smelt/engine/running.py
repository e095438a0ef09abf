"""The state of a merge that can be continued: made first, so that the result follows from it, and kept beside that.

``smelt-state`` in the output folder holds a tensor for each that was merged, under its name. It is a folder of its own
because loaders take every weight file beside config.json for the model's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy.typing as npt

from ..checkpoint import Part
from ..errors import InputRejected, UsageError, show
from ..kernels.dtypes import DTYPES
from ..kernels.program import Output as Formula
from ..methods import Method, Tensor
from ..recipe import Recipe
from .earlier import FORMAT, Earlier, not_continued
from .inputs import Input, identified
from .jobs import Sink
from .manifest import STATE_FOLDER, versions
from .operands import CheckpointOperand, Ledger
from .options import Options
from .outputs import STATE, Output
from .progress import Progress
from .types import common_dtype

#: Where its files lie.
PART = Part(STATE_FOLDER, "state")


@dataclass(eq=False)
class Running:
    """The state that a run makes, from that of an ``earlier`` merge on where there is one.

    ``outputs`` are its tensors. ``read`` gives elements of what has been written of them, ``known`` is what the
    survey has found.
    """

    method: Method
    earlier: Earlier | None
    outputs: tuple[Output, ...] = ()
    read: Callable[[str, int, npt.NDArray[Any]], None] | None = None
    known: Any = None

    @property
    def made_of(self) -> list[Any]:
        """What tells this state from others: the manifest and the files of the earlier one."""
        if self.earlier is None:
            return []
        return [json.dumps(self.earlier.content), [identified(file) for file in self.earlier.tensors.files()]]

    def check_intact(
        self, base: Input, ledger: Ledger, outputs: Sequence[Output], threads: int, progress: Progress
    ) -> None:
        """Before any work: InputRejected where the base or the earlier state are not what they were."""
        if self.earlier is not None:
            taken = {source.name for output in outputs for source in output.piece.sources if source.input is base}
            self.earlier.check_base(base, ledger, [base.operand(name, ledger) for name in sorted(taken)], threads)
            self.earlier.check_state(threads, progress)

    def check_unchanged(self) -> None:
        if self.earlier is not None:
            self.earlier.tensors.check_unchanged()

    def close(self) -> None:
        if self.earlier is not None:
            self.earlier.tensors.close()

    def begin(self, tensor: Tensor) -> Formula:
        """The output that is a tensor's state."""
        assert self.method.running is not None
        return self.method.running.state(tensor)

    @property
    def before(self) -> Mapping[str, float]:
        """What is known of the models that came before."""
        return {} if self.earlier is None else self.earlier.state["numbers"]

    def record(self, models: Sequence[str], tensors: Mapping[str, Any]) -> dict[str, Any]:
        """What the manifest says of the state after ``models`` have been added."""
        assert self.method.running is not None
        steps = [] if self.earlier is None else self.earlier.state["steps"]
        return {
            "format": FORMAT, "numbers": self.method.running.numbers(self.known),
            "steps": [*steps, {"models": list(models), "versions": versions()}],
            "tensors": {name.removeprefix(PART.prefix): tensors[name] for name in sorted(tensors)},
        }  # fmt: skip


class StateSink:
    """Takes the state's tensors under the names of the model's, by which errors tell of them."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    @property
    def waiting(self) -> int:
        return self._sink.waiting

    def write(self, name: str, start: int, array: npt.NDArray[Any], release: Callable[[], None]) -> None:
        self._sink.write(PART.prefix + name, start, array, release)

    def finish(self, name: str) -> None:
        self._sink.finish(PART.prefix + name)


@dataclass(eq=False)
class StateOperand:
    """A tensor of the state as an operand, once it has been written."""

    running: Running
    name: str
    dtype: str
    shape: tuple[int, ...]
    label: str = field(default="the state", init=False)

    @property
    def count(self) -> int:
        return prod(self.shape)

    def read(self, start: int, out: npt.NDArray[Any]) -> None:
        assert self.running.read is not None
        self.running.read(self.name, start, out)


def running_state(
    recipe: Recipe, method: Method, outputs: Sequence[Output], options: Options, earlier: Earlier | None
) -> tuple[Running, list[Output]]:
    """The state to make, and the outputs as they follow from it. UsageError or InputRejected where it cannot be."""
    UsageError.gather(f"save_state: {problem}" for problem in _problems(recipe, method, outputs, options))
    running = Running(method, earlier)
    if earlier is not None:
        outputs = [replace(output, dtype=_dtype(recipe, output, earlier)) for output in outputs]
        InputRejected.gather(_strangers(outputs, earlier))
    made = [_made(output, running) for output in outputs]
    running.outputs = tuple(state for state, _ in made if state is not None)
    return running, [output for _, output in made]


def _made(output: Output, running: Running) -> tuple[Output | None, Output]:
    """The state of an output that is merged, and the output as it is made from it."""
    if output.tensor is None:
        return None, output
    before = None if running.earlier is None else CheckpointOperand(running.earlier.tensors, output.name)
    tensor = replace(output.tensor, before=before)
    state = StateOperand(running, PART.prefix + output.name, tensor.computed_in, output.shape)
    first = replace(output, name=state.name, dtype=state.dtype, tensor=tensor, part=STATE)
    return first, replace(output, tensor=replace(tensor, state=state))


def _problems(recipe: Recipe, method: Method, outputs: Sequence[Output], options: Options) -> Iterator[str]:
    """What keeps the state from being that of one sum of whole models."""
    if method.running is None:
        yield not_continued(method)
        return
    if recipe.models is None:
        yield "slices and modules are not continued: list whole models"
    if recipe.vocabulary is not None or options.truncate_embeddings:
        yield "vocabularies that are brought into line depend on all models: leave it out"
    if recipe.output is not None and (recipe.output.format != "safetensors" or recipe.output.packing is not None):
        yield "the result must be plain safetensors: smelt convert makes other forms of it"
    if options.on_nonfinite != "error":
        yield f"on_nonfinite {options.on_nonfinite} would let NaN into the state, where it stays: leave it out"
    if any(recipe.statistics()):
        yield "statistics are not stored: leave them out"
    parameters = (output.tensor.shared for output in outputs if output.tensor is not None)
    yield from dict.fromkeys(found for shared in parameters if (found := method.running.obstacle(shared)))
    yield from _partial(recipe, outputs)
    yield from _namesakes(outputs)


def _partial(recipe: Recipe, outputs: Sequence[Output]) -> Iterator[str]:
    """Tensors that are not made of all models, or are one model's own: the next model could not add to them."""
    base = recipe.base_model.text if recipe.base_model is not None else None
    everyone = {given.model.text for given in recipe.models or ()} | {base}
    for output in outputs:
        held = {source.input.label for source in output.piece.sources}
        whole = held == everyone if output.tensor is not None else output.piece.sources[0].input.label == base
        if not whole:
            yield f"tensor {show(output.name)} is not made of the base and all models: leave it out (on_extra: drop)"


def _namesakes(outputs: Sequence[Output]) -> Iterator[str]:
    """Local models that the manifest could not tell apart, as it leaves out where they lie."""
    public = {source.input.label: source.input.public for output in outputs for source in output.piece.sources}
    for name, times in Counter(public.values()).items():
        if times > 1:
            yield f"{times} models are called {show(name)} once their folders are left out: rename them"


def _dtype(recipe: Recipe, output: Output, earlier: Earlier) -> str:
    """That which a merge of all models at once gives the tensor."""
    known = earlier.content["tensors"].get(output.name)
    if known is None or recipe.written_dtype or not DTYPES[output.dtype].arithmetic:
        return output.dtype
    return common_dtype([output.dtype, known["dtype"]])


def _strangers(outputs: Sequence[Output], earlier: Earlier) -> Iterator[str]:
    """Tensors that the merge so far and the models to be added do not both have, or in other ways."""
    where, stored = show(earlier.folder.name), earlier.content["tensors"]
    found = {output.name: output for output in outputs}
    for name in sorted(stored.keys() | found.keys()):
        output, shape = found.get(name), stored.get(name, {}).get("shape")
        if output is None or shape is None or list(output.shape) != shape:
            here = "nothing" if output is None else list(output.shape)
            yield f"tensor {show(name)}: {where} has {shape or 'nothing'}, what is added has {here}"
        elif (output.tensor is not None) != (name in earlier.tensors):
            yield f"tensor {show(name)}: merged in {where} or in what is added to it, and copied in the other"
        elif output.tensor is not None and _wider(output.tensor, earlier):
            yield f"tensor {show(name)} is in float64, but {where} has added it up in float32: merge all models at once"


def _wider(tensor: Tensor, earlier: Earlier) -> bool:
    return tensor.computed_in == "F64" and earlier.tensors.tensors[tensor.name].dtype != "F64"

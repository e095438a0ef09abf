"""How many gigabytes of bf16 input one core turns into output per second, for each method.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --record    also into the table of `smelt methods`

Two rates per method, both in CPU time, so that a busy machine hardly disturbs them: ``formula`` is the
compiled loop that makes the output, ``method`` everything from operands in memory on (the passes for
statistics, and the copy into tiles that stands for a read). Bytes of every input count once in both.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import strftime
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import report
from benchmarks.entrants import versions
from benchmarks.models import Curvature, Noise, Weights
from benchmarks.recipes import MERGES, Timed
from benchmarks.records import Rate, Session, command_line, machine
from benchmarks.shapes import BASE, FINE_TUNES, STATISTICS, bench_dir
from smelt.engine.execute import Executor
from smelt.engine.jobs import Job
from smelt.engine.parameters import constant_parameters
from smelt.engine.tiles import TILE, Tile
from smelt.kernels.launch import run_map
from smelt.kernels.program import Call, Copy, Operand
from smelt.methods import Model, Tensor, get

COUNT = 32 * TILE
REPEATS = 5
COSTS = Path(__file__).parents[1] / "src" / "smelt" / "methods" / "costs.json"

Patterns = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True, eq=False)
class Resident:
    """A bf16 operand in memory."""

    array: Patterns
    dtype: str = "BF16"
    shape: tuple[int, ...] = (4096, COUNT // 4096)

    @property
    def count(self) -> int:
        return self.array.size

    def read(self, start: int, out: npt.NDArray[Any]) -> None:
        out[:] = self.array[start : start + len(out)]


class Discard:
    """A sink that keeps nothing."""

    waiting = 0

    def write(self, name: str, start: int, array: npt.NDArray[Any], release: Callable[[], None]) -> None:
        release()

    def finish(self, name: str) -> None:
        pass


class Computing:
    """A mapper that computes, and remembers what it was asked to compute."""

    call: Call

    def __call__(self, name: str, output: Call | Copy, dtype: str, tile: Tile, out: npt.NDArray[Any]) -> None:
        assert isinstance(output, Call)
        self.call = output
        run_map(output, dtype, tile, tile.start, out)


def operands() -> dict[str, Resident]:
    """One tensor of each synthetic model."""
    base = Noise.weights(0)
    noise = {name: Noise.task_vector(seed) for seed, name in enumerate(FINE_TUNES, 1)}
    weights: dict[str, Weights | Curvature] = {BASE: Weights(base)}
    weights |= {name: Weights(base, own) for name, own in noise.items()}
    weights |= {STATISTICS[name]: Curvature(own) for name, own in noise.items()}
    return {name: Resident(np.concatenate([*own.patterns("w", COUNT)])) for name, own in weights.items()}


def job_of(timed: Timed, inputs: dict[str, Resident], executor: Executor) -> Job:
    """The merge of one tensor, with the parameters that mergekit's recipe would give it."""
    method = get(timed.method)
    models = tuple(inputs[name] for name in timed.models if name != BASE or method.base == "ignored")
    variant = {"variant": "mergekit"} if "mergekit" in method.variants else {}
    shared, each = constant_parameters(method, dict((*timed.per_model, *timed.shared)) | variant, {}, len(models))
    base = inputs[BASE] if timed.base else None
    beside = tuple(inputs[STATISTICS[name]] for name in timed.models) if timed.statistics else ()
    statistics = {method.statistics[0].kind: beside} if beside else {}
    tensor = Tensor("w", base, models, shared, each, statistics=statistics)
    if method.survey is not None:
        tensor = replace(tensor, survey=executor.survey(method.survey(Model((tensor,)))))
    taking_part = dict.fromkeys([*([base] if base else []), *models, *beside])
    return Job("w", "BF16", COUNT, list(taking_part), lambda: method.merge(tensor))


def rate(timed: Timed, inputs: dict[str, Resident]) -> Rate:
    mapper = Computing()

    def whole() -> int:
        with Executor(Discard(), mapper, threads=1) as executor:
            job = job_of(timed, inputs, executor)
            executor.run([job])
        return len(job.inputs)

    gigabytes = 2 * COUNT * whole() / 1e9
    alone = all(isinstance(operand, Resident) for operand in mapper.call.operands()) and mapper.call.row is None
    formula = gigabytes / best(lambda: every_tile(mapper.call)) if alone else None
    return Rate(timed.method, len(timed.inputs("0.1B")), formula, gigabytes / best(whole))


def every_tile(call: Call) -> None:
    """Compute the output tile by tile, straight from the operands' memory into one reused buffer."""
    out = np.empty(TILE, np.uint16)
    for start in range(0, COUNT, TILE):
        run_map(call, "BF16", _window(start), start, out)


def _window(start: int) -> Callable[[Operand], Patterns]:
    return lambda operand: operand.array[start : start + TILE]  # type: ignore[attr-defined]


def best(action: Callable[[], object]) -> float:
    """The least CPU seconds of several runs."""
    seconds = []
    for _ in range(REPEATS):
        started = time.process_time()
        action()
        seconds.append(time.process_time() - started)
    return min(seconds)


def costing(rate: Rate) -> float:
    """CPU nanoseconds per element of input: two digits, since more would be noise."""
    return float(f"{2 / rate.whole:.2g}")


def main() -> None:
    inputs = operands()
    session = Session(command_line("benchmarks.kernels", sys.argv[1:]), machine(bench_dir()), versions(["smelt"]))
    session.rates = [rate(timed, inputs) for timed in MERGES.values() if not get(timed.method).needs_layers]
    path: Path = report.sessions_dir() / f"{strftime('%Y%m%d-%H%M%S')}-kernels.json"
    session.save(path)
    if "--record" in sys.argv[1:]:
        COSTS.write_text(
            json.dumps({rate.method: costing(rate) for rate in session.rates}, indent=2, sort_keys=True) + "\n"
        )
    print(report.rate_table(session.rates))
    print(f"recorded in {path}: python -m benchmarks.report FILE... puts it into RESULTS.md")


if __name__ == "__main__":
    main()

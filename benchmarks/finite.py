"""What looking for NaN and Inf costs: python -m benchmarks.finite [rounds]

The same merge of one bf16 tensor in memory, by one thread, with the kernels as they are and with kernels from whose
source the two checks (of inputs, of the output) are left out. Both take turns, so that a slow minute hits both;
CPU time, the least and the median of many rounds. A merge of files also reads, digests and writes, and what it
spends on the check is the smaller a part of it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from statistics import median
from unittest.mock import patch

from benchmarks.kernels import Discard, Resident, job_of, operands
from benchmarks.recipes import MERGES, Timed
from smelt.engine.device import mapper_for
from smelt.engine.execute import Executor
from smelt.kernels import launch
from smelt.kernels.compile import kernel_for
from smelt.kernels.generate import Kinds, generate, kinds_of, precision_of
from smelt.kernels.native import Kernel, load
from smelt.kernels.program import Call
from smelt.kernels.source import Formula

METHODS = ("linear", "task_arithmetic", "ties")
ROUNDS = 25


def unchecked(template: str, call: Call, out: str = "") -> Kernel:
    """What ``kernel_for`` gives, without the checks."""
    if template != "map":
        return kernel_for(template, call, out)
    return _without_checks(call.formula, kinds_of(call), precision_of(call), out)


@cache
def _without_checks(formula: Formula, kinds: Kinds, precision: str, out: str) -> Kernel:
    made = generate("map", formula, kinds, precision, out)
    kept = [line for line in made.text.splitlines() if "bad_in |=" not in line and "bad_out |=" not in line]
    assert len(kept) < len(made.text.splitlines())
    return load(replace(made, text="\n".join(kept) + "\n"))


def seconds(timed: Timed, inputs: dict[str, Resident], kernels: Callable[..., Kernel]) -> float:
    """CPU seconds of one merge."""
    with (
        patch.object(launch, "kernel_for", kernels),
        Executor(Discard(), mapper_for("cpu", "error", print), threads=1) as executor,
    ):
        job = job_of(timed, inputs, executor)
        begin = time.process_time()
        executor.run([job])
        return time.process_time() - begin


def share(timed: Timed, inputs: dict[str, Resident], rounds: int) -> str:
    """A row: milliseconds with and without, and what part of the CPU time the checks are."""
    seconds(timed, inputs, kernel_for), seconds(timed, inputs, unchecked)
    pairs = [(seconds(timed, inputs, kernel_for), seconds(timed, inputs, unchecked)) for _ in range(rounds)]
    checked, plain = zip(*pairs, strict=True)
    least, middle = (100 * (1 - of(plain) / of(checked)) for of in (min, median))
    times = [f"{1000 * of(times):.1f}" for times in (checked, plain) for of in (min, median)]
    return f"| {timed.method} | {' | '.join(times)} | {least:.1f} % | {middle:.1f} % |"


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    inputs = operands()
    print("| method | checked: least ms | median | unchecked: least ms | median | checks: of least | of median |")
    print("| --- " * 7 + "|")
    for method in METHODS:
        print(share(next(timed for timed in MERGES.values() if timed.method == method), inputs, rounds))


if __name__ == "__main__":
    main()

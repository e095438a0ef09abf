"""What a method costs: CPU time per element, as measured by `python -m benchmarks.kernels --record`."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from .. import storage


@cache
def _measured() -> dict[str, float]:
    found: dict[str, float] = json.loads(storage.read_small(Path(__file__).with_name("costs.json"), 1 << 16))
    return found


def cost_of(method: str) -> float | None:
    """CPU nanoseconds per element of all inputs together, every pass counted; None where it was not measured.

    One core, bf16, a base and up to three models with the parameters of ``benchmarks/recipes.py``. Other machines
    differ in all of them by about the same factor.
    """
    return _measured().get(method)

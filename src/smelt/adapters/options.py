"""What an extraction was asked for, checked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError, show
from ..kernels.dtypes import NAMES
from .lowrank import Limits
from .modules import Module

Fate = Literal["low rank", "whole", "nothing"]
Form = Literal["lora", "flora"]


@dataclass(frozen=True)
class Options:
    """The options of :func:`smelt.extract_lora`, as they are described there."""

    limits: Limits
    distribute_scale: bool = True
    embeddings: bool = False
    save_modules: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    skip_undecomposable: bool = False
    factor_dtype: str = "float32"
    form: Form = "lora"

    def __post_init__(self) -> None:
        UsageError.gather(self._problems())

    @property
    def dtype(self) -> str:
        """The safetensors code of the factors' dtype."""
        return NAMES[self.factor_dtype]

    def _problems(self) -> Iterator[str]:
        limits = self.limits
        if limits.rank < 1:
            yield f"rank must be at least 1, not {limits.rank}"
        if limits.error is not None and not 0 <= limits.error < 1:
            yield f"error must lie in [0, 1), a share of the difference's norm, not {limits.error}"
        if not 0 <= limits.sv_epsilon < float("inf"):
            yield f"sv_epsilon must be 0 or more, not {limits.sv_epsilon}"
        if self.factor_dtype not in NAMES:
            yield f"factor_dtype must be float32, bfloat16, float16 or float64, not {show(self.factor_dtype)}"
        if self.form not in ("lora", "flora"):
            yield f"form must be lora or flora, not {show(self.form)}"
        if self.form == "flora" and (limits.sv_epsilon or not self.distribute_scale):
            yield "sv_epsilon and distribute_scale have no effect with form: flora, whose core holds the values"
        yield from (problem for pattern in (*self.include, *self.exclude) for problem in _pattern_problem(pattern))

    def fate(self, module: Module, resized: bool) -> tuple[Fate, str]:
        """What becomes of a module, and why where that is not the rule. ``resized``: its shape is not the base's."""
        if not self._wants(module.name):
            return "nothing", "left out by the patterns"
        if module.last in self.save_modules:
            return "whole", "asked for"
        if resized:
            return "whole", "another vocabulary"
        if module.kind == "embedding" or module.head:
            return ("low rank" if self.embeddings else "whole"), ""
        if module.kind != "other":
            return "low rank", ""
        if self.skip_undecomposable:
            return "nothing", "cannot be decomposed"
        return ("whole", "") if module.leaf else ("nothing", "an adapter has no place for it")

    def _wants(self, module: str) -> bool:
        """Whether the patterns let a module in; ``exclude`` wins."""
        if any(re.search(pattern, module) for pattern in self.exclude):
            return False
        return not self.include or any(re.search(pattern, module) for pattern in self.include)


def _pattern_problem(pattern: str) -> Iterator[str]:
    try:
        re.compile(pattern)
    except re.error as mistake:
        yield f"{show(pattern)} is not a regular expression: {mistake}"

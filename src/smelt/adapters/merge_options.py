"""What a merge of adapters was asked for, checked; and the rule that it comes to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, sqrt
from typing import Any

from ..errors import InputRejected, UsageError, show
from ..kernels.dtypes import NAMES
from ..methods import get
from ..methods.registry import REQUIRED
from .combinations import Combination
from .factored import EVERYTHING
from .lowrank import Limits
from .pieces import Piece
from .rules import Compatible, Exact, InCore, Rule


@dataclass(frozen=True)
class MergeOptions:
    """The options of :func:`smelt.merge_lora`, as they are described there."""

    weights: tuple[float, ...] | None = None
    rank: int | None = None
    error: float | None = None
    combination_type: str | None = None
    density: float | None = None
    majority_sign_method: Any = None
    method: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    factor_dtype: str = "float32"

    def check(self, adapters: int) -> None:
        """UsageError with everything that is wrong, for so many adapters."""
        UsageError.gather(self._problems(adapters))

    def factors(self, adapters: int) -> Sequence[float]:
        """One weight for each adapter."""
        return self.weights or (1.0,) * adapters

    @property
    def dtype(self) -> str:
        """The safetensors code of the factors' dtype."""
        return NAMES[self.factor_dtype]

    @property
    def described(self) -> str:
        """How the result was made, in words."""
        if self.method is not None:
            return f"by `{self.method}` in core space"
        if self.combination_type is not None:
            return f"by PEFT's combination type `{self.combination_type}`"
        return "as their exact weighted sum" + (", cut to a lower rank" if self.rank or self.error else "")

    def _problems(self, adapters: int) -> Iterator[str]:
        if not adapters:
            yield "no adapter is named: give one or more"
        if self.weights is not None and len(self.weights) != adapters:
            yield f"{len(self.weights)} weights for {adapters} adapters: give one for each, in order"
        yield from (f"weights must be finite numbers, not {w}" for w in self.weights or () if not isfinite(w))
        if self.rank is not None and self.rank < 1:
            yield f"rank must be at least 1, not {self.rank}"
        if self.error is not None and not 0 <= self.error < 1:
            yield f"error must lie in [0, 1), a share of the sum's norm, not {self.error}"
        if self.factor_dtype not in NAMES:
            yield f"factor_dtype must be float32, bfloat16, float16 or float64, not {show(self.factor_dtype)}"
        if self.combination_type is not None and self.method is not None:
            yield "combination_type and method are two ways to merge: choose one"
        yield from self._idle()
        if self.combination_type is not None:
            yield from self._combination(adapters).problems()

    def _idle(self) -> Iterator[str]:
        """Options without effect beside the others."""
        if self.combination_type is not None and self.error is not None:
            yield "error has no effect with combination_type: PEFT's types have a rank"
        if self.combination_type is None and self.density is not None:
            yield "density has no effect without combination_type"
        if self.combination_type is None and self.majority_sign_method is not None:
            yield "majority_sign_method has no effect without combination_type"
        if self.method is None and self.parameters:
            yield f"{', '.join(self.parameters)}: parameters have no effect without method"

    def _combination(self, adapters: int) -> Combination:
        """PEFT's rule for a single adapter is always linear."""
        name = str(self.combination_type)
        asked = Combination(name, self.rank, self.density, self.majority_sign_method, self.seed)
        return Combination("linear") if adapters == 1 and not tuple(asked.problems()) else asked

    def rule(self, pieces: Sequence[Piece], adapters: int, stabilised: bool) -> Rule:
        """For these modules; ``stabilised``: PEFT scales the result as rank-stabilised LoRA. InputRejected."""
        limits = Limits(self.rank or EVERYTHING.rank, self.error)
        if self.method is not None:
            return InCore(self.method, self.parameters, self._per_model(adapters), self.seed, limits)
        if self.combination_type is None:
            return Exact(limits)
        combination = self._combination(adapters)
        ranks = [
            max((update.rank for piece in pieces for other, update in piece.parts if other == place), default=0)
            for place in range(adapters)
        ]
        if combination.equal_ranks:
            InputRejected.gather(_unequal(combination.name, pieces, ranks))
        rank = combination.new_rank(ranks)
        return Compatible(combination, rank, sqrt(rank) if stabilised else 1.0)

    def _per_model(self, adapters: int) -> Mapping[str, Sequence[float]]:
        weight = get(str(self.method)).parameter("weight")
        needed = weight is not None and weight.default is REQUIRED and "weight" not in self.parameters
        return {"weight": self.factors(adapters)} if self.weights or needed else {}


def _unequal(name: str, pieces: Sequence[Piece], ranks: Sequence[int]) -> Iterator[str]:
    advice = "leave combination_type out to merge exactly, or take svd"
    if len(set(ranks)) > 1:
        yield f"combination_type: {name} adds factors up, but the adapters' ranks are {list(ranks)}: {advice}"
        return
    odd = next((piece for piece in pieces if len(set(piece.ranks)) > 1), None)
    if odd is not None:
        where = f"the ranks of {show(odd.name)} are {odd.ranks}"
        yield f"combination_type: {name} adds factors up, but {where}: {advice}"

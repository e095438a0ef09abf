"""What a method sees of the work: one output tensor with its operands and parameters, or all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sin
from typing import Any

from ..architecture import TensorRole
from ..kernels.program import Change, Draw, Mask, Operand
from ..kernels.random import key_of
from ..kernels.vocabulary import where


@dataclass(frozen=True, eq=False)
class Tensor:
    """One output tensor.

    ``models`` are the operands that are merged (without the base where the method has one), in recipe
    order. ``shared`` holds the values of shared parameters, ``each`` of per-model ones (a tuple each).
    ``statistics`` maps a kind to one operand per model, ``masks`` are draws handed in (1 = kept). ``role`` is
    the output tensor's place in the model. ``ranks`` are those of the models' changes to the base, where all are
    known to be products and the method wants them so (:attr:`Method.low_rank`); else empty. ``before`` is the running
    state of the models that were merged before, where a merge is continued; ``state`` that after all models, where it
    has been made (see :class:`registry.Running`).
    """

    name: str
    base: Operand | None
    models: tuple[Operand, ...]
    shared: Mapping[str, Any]
    each: Mapping[str, tuple[Any, ...]]
    seed: int = 0
    statistics: Mapping[str, tuple[Operand, ...]] = field(default_factory=dict)
    masks: tuple[Operand, ...] | None = None
    survey: Any = None
    role: TensorRole | None = None
    ranks: tuple[int, ...] = ()
    before: Operand | None = None
    state: Operand | None = None

    @property
    def changes(self) -> tuple[Change, ...]:
        """The models as factors of what they change, where ``ranks`` are known."""
        return tuple(Change(model, rank) for model, rank in zip(self.models, self.ranks, strict=False))

    @property
    def size(self) -> int:
        """Number of models that are merged."""
        return len(self.models)

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.models[0].count if self.models else self._the_base.count

    @property
    def _the_base(self) -> Operand:
        assert self.base is not None
        return self.base

    @property
    def shape(self) -> tuple[int, ...]:
        return self.models[0].shape if self.models else self._the_base.shape

    @property
    def computed_in(self) -> str:
        """The dtype of its formulas: F64 where an operand is, else F32."""
        operands = (self.base, self.before, *self.models)
        return "F64" if any(operand is not None and operand.dtype == "F64" for operand in operands) else "F32"

    def __getitem__(self, parameter: str) -> Any:
        """The value of a shared parameter."""
        return self.shared[parameter]

    @property
    def variant(self) -> str:
        return str(self.shared.get("variant", "paper"))

    def kept(self, densities: tuple[Any, ...]) -> tuple[Mask | Draw | bool, ...]:
        """One random draw per model: keep with probability ``density`` (as of a Draw), or the mask handed in."""
        if self.masks is not None:
            return tuple(Mask(mask) for mask in self.masks)
        return tuple(
            True
            if isinstance(density, int | float) and density >= 1
            else Draw(key_of(self.seed, self.name, index), density)
            for index, density in enumerate(densities)
        )


@dataclass(frozen=True, eq=False)
class Model:
    """All tensors that a whole-model statistic spans, sorted by name.

    ``before``: what was known of the models that were merged before, where a merge is continued.
    """

    tensors: tuple[Tensor, ...]
    before: Mapping[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of elements per model."""
        return sum(tensor.count for tensor in self.tensors)

    @property
    def size(self) -> int:
        """Number of models that are merged."""
        return self.tensors[0].size if self.tensors else 0

    def __getitem__(self, parameter: str) -> Any:
        """The value of a shared parameter (the same for every tensor)."""
        return self.tensors[0].shared[parameter]

    @property
    def each(self) -> Mapping[str, tuple[Any, ...]]:
        """The values of per-model parameters (the same for every tensor)."""
        return self.tensors[0].each


def identity(x: Any) -> Any:
    return x


def delta(base: Any, model: Any) -> Any:
    """The task vector's element: fine-tuned minus base."""
    return model - base


def kept_delta(base: Any, model: Any, keep: Any) -> Any:
    """The task vector's element where it was drawn, 0 elsewhere."""
    return where(keep, model - base, 0)


def sine(x: Any) -> Any:
    """The sine of a number, or of what stands for one under autograd."""
    return x.sin() if hasattr(x, "sin") else sin(x)

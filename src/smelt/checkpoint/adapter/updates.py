"""What an adapter does to the tensors of its base, one class per kind. Nothing here has read a value.

``module`` is the base's name of a module ("model.layers.0.self_attn.q_proj"), ``target`` that of the tensor that
changes. Factors are :class:`TensorInfo` of the adapter's file: their names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from ..base import TensorInfo

Form = Literal["linear", "embedding", "convolution", "experts"]


@dataclass(frozen=True)
class Update:
    """Base of all kinds: one tensor of one module changes."""

    module: str

    @property
    def target(self) -> str:
        return f"{self.module}.weight"

    def tensors(self) -> Iterator[TensorInfo]:
        """All tensors of the adapter's file that this takes part in."""
        for field in fields(self):
            value = getattr(self, field.name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Product):
                    yield from item.tensors()
                elif isinstance(item, TensorInfo):
                    yield item


@dataclass(frozen=True)
class LowRank(Update):
    """LoRA (Hu et al., 2022): ``delta = scaling * B A``.

    a, b: by ``form``, (r, in) and (out, r) for "linear"; (r, rows) and (width, r) for "embedding", whose delta is
        (B A)^T; (r, in, kernel...) and (out, r, 1...) for "convolution"; (experts * r, in) and (out, r * experts) for
        "experts", where the rows of A go by expert and then rank, the columns of B by rank and then expert.
    rank: r. scaling: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
    transposed: a linear layer that is stored as (in, out), so that (B A)^T is added.
    magnitude: DoRA's norms (Liu et al., 2024), one per output: the rows of W + delta are scaled to them.
    bias: of B, (out,); the module's own bias grows by ``scaling * bias``.
    parameter: what changes of the module.
    """

    a: TensorInfo
    b: TensorInfo
    rank: int
    scaling: float
    form: Form = "linear"
    transposed: bool = False
    magnitude: TensorInfo | None = None
    bias: TensorInfo | None = None
    parameter: str = "weight"

    @property
    def target(self) -> str:
        return f"{self.module}.{self.parameter}"

    @property
    def experts(self) -> int:
        """How many matrices the parameter stacks."""
        return self.a.shape[0] // self.rank if self.form == "experts" else 1


@dataclass(frozen=True)
class Product:
    """A matrix: stored whole, as (out, r) times (r, in), or with a core (r, r, kernel...) as a Tucker product.

    With a core the factors are (r, out) and (r, in).
    """

    whole: TensorInfo | None = None
    a: TensorInfo | None = None
    b: TensorInfo | None = None
    core: TensorInfo | None = None

    def tensors(self) -> Iterator[TensorInfo]:
        return (tensor for tensor in (self.whole, self.a, self.b, self.core) if tensor is not None)


@dataclass(frozen=True)
class Hadamard(Update):
    """LoHa (Hyeon-Woo et al., 2022): ``delta = scaling * left * right``, element by element."""

    left: Product
    right: Product
    rank: int
    scaling: float


@dataclass(frozen=True)
class Kronecker(Update):
    """LoKr: ``delta = scaling * (left (x) right)``, the Kronecker product (Yeh et al., 2023)."""

    left: Product
    right: Product
    rank: int
    scaling: float


@dataclass(frozen=True)
class Tucker(Update):
    """FLoRA: ``delta = scaling * core x_0 factors[0] x_1 factors[1] ...`` with the axes (in, out, kernel...).

    factors: (size of the axis, rank), one per axis of the core. number: where the file keeps ``scaling``.
    """

    core: TensorInfo
    factors: tuple[TensorInfo, ...]
    scaling: float
    number: TensorInfo | None = None


@dataclass(frozen=True)
class Shards(Update):
    """MoS: LoRA whose A and B are put together from shards of pools.

    pool_a (shards, in / n), pool_b (out / n, shards); index_a, index_b (r n): row j of A is the n rows of its pool
    at j n ..., one after the other; so is column j of B of columns.
    """

    pool_a: TensorInfo
    pool_b: TensorInfo
    index_a: TensorInfo
    index_b: TensorInfo
    rank: int
    scaling: float


@dataclass(frozen=True)
class Packed(Update):
    """Of a delta pack: something is added to a tensor, which is ``parameter`` of ``module`` (which may be empty)."""

    parameter: str

    @property
    def target(self) -> str:
        return f"{self.module}.{self.parameter}".removeprefix(".")


@dataclass(frozen=True)
class Entries(Packed):
    """Single elements: ``index`` (k,) are their places in C order, ascending, ``value`` (k,) what is added to them."""

    index: TensorInfo
    value: TensorInfo


@dataclass(frozen=True)
class Signs(Packed):
    """``scale`` (one number) added where the bit is 1, and taken away elsewhere; bits in C order, the highest first."""

    bits: TensorInfo
    scale: TensorInfo


@dataclass(frozen=True)
class Dense(Packed):
    """``value``, of the tensor's own shape."""

    value: TensorInfo


@dataclass(frozen=True)
class Scaled(Update):
    """(IA)^3 (Liu et al., 2022): columns (``inputs``) or rows of the weight are multiplied by a vector.

    Where it is rows, the module's bias is multiplied as well. transposed: as for :class:`LowRank`.
    """

    vector: TensorInfo
    inputs: bool
    transposed: bool = False


@dataclass(frozen=True)
class Rows(Update):
    """Some rows of an embedding take new values: ``values`` (tokens, width) replace the rows ``tokens``."""

    values: TensorInfo
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Saved(Update):
    """A tensor that was trained whole replaces that of the base. ``module`` may be empty."""

    value: TensorInfo
    parameter: str = "weight"

    @property
    def target(self) -> str:
        return f"{self.module}.{self.parameter}".removeprefix(".")

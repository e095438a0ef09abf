"""Which tensors are merged from the factors of what adapters change, told from headers alone."""

from __future__ import annotations

from dataclasses import replace

from ..methods import Method, Tensor
from .operands import CheckpointOperand


def with_ranks(method: Method, tensor: Tensor) -> Tensor:
    """The tensor with the ranks of all models' changes to its base, where these are known and the method wants them."""
    ranks = [model.rank(tensor.base) if isinstance(model, CheckpointOperand) else None for model in tensor.models]
    known = replace(tensor, ranks=tuple(rank for rank in ranks if rank is not None))
    return known if ranks and len(known.ranks) == len(ranks) and method.low_rank(known) else tensor

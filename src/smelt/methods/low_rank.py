"""Changes of low rank (LoRA), merged from their factors: nothing as large as the matrix is made but the result.

    D_t = s_t B_t A_t,   t = 1 .. T,   R the sum of the ranks

Where a method looks at rows or columns only together, so that turning them turns its result, it gives the same in
the space that the factors share, on matrices of R rows and columns at most (core space). A method that looks at
single columns is given the rows alone in few coordinates: [B_1 .. B_T] = Q R, D_t = Q (s_t R_t A_t).

The cost is that of the thin decompositions, O((m + n) R^2), and of one product for the result. It is exact but for
the rounding of fp64, and better than the merge of the models themselves: a model is read in fp32, and what rounding
adds there to D_t is of full rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..checkpoint import Factors
from ..kernels.program import Source
from .spectral import Matrix, triplets
from .task_matrices import STRIP, at_most
from .tensors import Tensor

# --- when -----------------------------------------------------------------------------------------------------


def is_unchanged(tensor: Tensor) -> bool:
    """Whether it is known that no model differs from the base."""
    return bool(tensor.ranks) and not any(tensor.ranks)


def is_low_rank(tensor: Tensor, taken: bool) -> bool:
    """:attr:`Method.low_rank` of a method that takes the tensor apart (``taken``), and leaves what no model changed.

    From half the rank of the matrix on factors are no smaller than what they stand for.
    """
    return is_unchanged(tensor) or (taken and 2 * sum(tensor.ranks) <= min(_shape(tensor)))


def holds_factors(tensor: Tensor, work: int) -> tuple[int, int]:
    """:attr:`Method.holds` of factors: beside them ``work`` bytes, then what the result is made of, strip by strip."""
    factors, strip = sum(change.nbytes for change in tensor.changes), min(tensor.count, STRIP)
    return at_most(tensor, factors + work, 3 * factors + 40 * strip)


def holds_core(tensor: Tensor) -> tuple[int, int]:
    """Of :func:`merged_in_core`: the singular vectors of one side after the other, and work on small matrices."""
    rows, columns = _shape(tensor)
    rank = sum(tensor.ranks)
    return holds_factors(tensor, rank * (8 * rows + 28 * max(rows, columns) + 8 * (14 + tensor.size) * rank))


def _shape(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[0] if tensor.shape else 1, prod(tensor.shape[1:])


# --- both sides in few coordinates ----------------------------------------------------------------------------


class Core(NamedTuple):
    """The space that all changes of a matrix share: orthonormal columns (m, p) and (n, q), and each in it (p, q).

    Panariello et al., "Accurate and efficient low-rank model merging in core space", NeurIPS 2025,
    https://arxiv.org/abs/2509.17786: the singular vectors of the factors side by side, as they are.
    """

    left: Matrix
    right: Matrix
    terms: list[Matrix]


def core(changes: Sequence[Factors]) -> Core:
    """Of one or more changes. Nothing is lost: ``left @ terms[i] @ right.T`` is the i-th."""
    left = triplets(np.concatenate([change.left for change in changes], axis=1)).left
    right = triplets(np.concatenate([change.right for change in changes], axis=0)).right
    return Core(left, right, [change.scaling * (left.T @ change.left) @ (change.right @ right) for change in changes])


def merged_in_core(
    base: Source, changes: tuple[Factors, ...], function: Callable[..., Matrix], **given: Any
) -> Iterator[Matrix]:
    """The base and what ``function`` makes of the changes, by strips; it sees them in core space, the base as 0."""
    found = core(changes)
    zero = np.zeros_like(found.terms[0])
    merged = function(base=zero, models=tuple(found.terms), **given) if zero.size else zero
    yield from added(base, found.left @ merged, found.right.T)


# --- rows in few coordinates ----------------------------------------------------------------------------------


def with_shared_rows(changes: Sequence[Factors]) -> tuple[Matrix, list[Matrix]]:
    """Q (m, k) with orthonormal columns, and each change (k, n) in these."""
    basis, triangle = np.linalg.qr(np.concatenate([change.left for change in changes], axis=1, dtype=np.float64))
    ends = np.cumsum([change.left.shape[1] for change in changes])[:-1]
    parts = zip(np.split(triangle, ends, axis=1), changes, strict=True)
    return basis, [np.asarray(change.scaling * (part @ change.right), np.float64) for part, change in parts]


def transposed(change: Factors) -> Factors:
    """That of the transposed matrix."""
    return Factors(change.right.T, change.left.T, change.scaling)


def added(base: Source, left: Matrix, right: Matrix) -> Iterator[Matrix]:
    """base + left @ right, a strip of whole rows at a time."""
    rows, columns = base.shape
    step = max(1, STRIP // max(1, columns))
    for first in range(0, rows, step):
        strip = left[first : first + step] @ right
        strip += base.rows(first, min(first + step, rows))
        yield strip

"""KnOTS: merge task vectors in coordinates that they share, found by one SVD of all of them side by side.

Stoica et al., "Model merging with SVD to tie the KnOTS", ICLR 2025, https://arxiv.org/abs/2410.19735. For each matrix,
with Delta_t = theta_t - theta_0 (m, n):

1. [Delta_1 .. Delta_T] = U S [V_1 .. V_T]^T, without singular values up to ``tolerance`` times the largest;
   ``shared: input`` does so with all Delta_t transposed. C_t = S V_t^T are the coordinates of task t: Delta_t = U C_t.
2. Where ``drop_rate`` is above 0, so many of the coordinates are dropped at random, the others divided by
   1 - drop_rate (DARE).
3. Each C_t keeps its largest elements, by one threshold over all its matrices (``scope``), a share ``density`` of
   them, and with ``rule: ties`` those of the sign of the sum of what is kept.
4. C is the mean, or the sum (``merge_func``), of what is kept; theta = theta_0 + alpha U C.

An even vote leaves nothing, because the signs of U are arbitrary. Rounded to fp32 after the decomposition, as the
authors do. With rule tv and density 1 this is the mean of the task vectors: only what is not linear sees coordinates.
Matrices of attention and feed-forward blocks are merged so (those that LoRA adapts), all others take the mean of the
deltas, times alpha. Adapters of the base are aligned as factors (:mod:`smelt.methods.low_rank`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint import Factors
from ..kernels.arrays import apply
from ..kernels.blas import one_thread
from ..kernels.lapack import square
from ..kernels.program import Call, Copy, Draw, Rows, Source, Whole
from ..kernels.random import drawn, words
from ..kernels.vocabulary import where
from .interference import linear_weight
from .low_rank import added, holds_factors, is_low_rank, is_unchanged, transposed, with_shared_rows
from .registry import EXCLUDE, SCOPE, Citation, Method, Parameter, Steps
from .spectral import Matrix, descending, finite, strips_of
from .task_matrices import ALPHA, TOLERANCE, at_most, averaged, delta_of, held
from .tensors import Model, Tensor

Coordinates = npt.NDArray[np.float32]

#: Coordinates are counted by the upper bits of their magnitude first: exponent and seven bits of the fraction.
_SHIFT, _BINS = 16, 1 << 15


# --- the coordinates ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aligned:
    """The basis U (m, r) in fp64, as the product of ``factors``, and T times coordinates (r, n)."""

    factors: tuple[Matrix, ...]
    coordinates: tuple[Coordinates, ...]

    def expanded(self, joint: Coordinates) -> Matrix:
        """U C (m, n), from the right: a long basis is never made."""
        found = np.asarray(joint, np.float64)
        for factor in reversed(self.factors):
            found = factor @ found
        return found


def aligned(base: Any, models: tuple[Any, ...], turned: bool, tolerance: float, **drops: Any) -> Aligned:
    """Steps 1 and 2 for T matrices (m, n); ``turned``: for their transposes. ``drops``: as for :func:`thinned`."""
    deltas = [delta_of(base, model) for model in models]
    return thinned(_coordinates([delta.T for delta in deltas] if turned else deltas, tolerance), **drops)


def aligned_factors(changes: tuple[Factors, ...], turned: bool, tolerance: float, **drops: Any) -> Aligned:
    """The same from factors: in coordinates of all rows, the Gram matrix has as many rows as there are ranks."""
    basis, deltas = with_shared_rows([transposed(change) for change in changes] if turned else changes)
    found = _coordinates(deltas, tolerance)
    return thinned(Aligned((basis, *found.factors), found.coordinates), **drops)


def _coordinates(deltas: list[Matrix], tolerance: float) -> Aligned:
    rows, columns = deltas[0].shape
    return _wide(deltas, tolerance) if rows <= len(deltas) * columns else _tall(deltas, tolerance)


def _wide(deltas: list[Matrix], tolerance: float) -> Aligned:
    """The Gram matrix of the side that all share is the sum of everyone's own."""
    gram = square(len(deltas[0]))
    for delta in deltas:
        gram += delta @ delta.T
    basis = _leading(gram, tolerance)[1]
    return Aligned((basis,), tuple(np.asarray(basis.T @ delta, np.float32) for delta in deltas))


def _tall(deltas: list[Matrix], tolerance: float) -> Aligned:
    """Where all columns together are fewer than rows, theirs is the smaller."""
    joint = np.concatenate(deltas, axis=1)
    sigma, right = _leading(strips_of(joint).gram(), tolerance)
    coordinates = np.asarray((right * sigma).T, np.float32)
    return Aligned((joint, right / sigma), tuple(np.split(coordinates, len(deltas), axis=1)))


def _leading(gram: Matrix, tolerance: float) -> tuple[Matrix, Matrix]:
    """Singular values, the largest first, from a Gram matrix, and their vectors (n, r)."""
    values, vectors = descending(gram)
    least = max(tolerance * tolerance, 10 * len(gram) * float(np.finfo(np.float64).eps))
    count = int((values > least * max(0.0, values[0])).sum())
    return np.sqrt(values[:count]), vectors[:, :count]


def thinned(found: Aligned, kept: tuple[Any, ...], rate: float) -> Aligned:
    """Step 2. ``kept`` of each task: True, a draw, or bool (m, n), of which as many count as there are coordinates."""
    return Aligned(found.factors, tuple(_thinned(c, k, rate) for c, k in zip(found.coordinates, kept, strict=True)))


def _thinned(coordinates: Coordinates, kept: Any, rate: float) -> Coordinates:
    if kept is True:
        return coordinates
    if isinstance(kept, Draw):
        kept = drawn(words(kept.key, 0, coordinates.size), kept.density)
    chosen = kept.reshape(-1)[: coordinates.size].reshape(coordinates.shape)
    return np.where(chosen, coordinates / np.float32(1 - rate), np.float32(0))


# --- the thresholds: two looks at all coordinates, the second at few of them ----------------------------------


def survey(model: Model) -> Steps:
    """Each task's least magnitude that is kept, over all matrices; None: every matrix has its own."""
    chosen = [tensor for tensor in model.tensors if is_aligned(tensor) and not is_unchanged(tensor)]
    if not chosen or model["scope"] == "tensor" or model["density"] == 1:
        return None
    histograms = yield tuple(_looked_at(tensor, _histogram) for tensor in chosen)
    counts = np.zeros((model.size, _BINS), np.int64)
    for index, count in histograms:
        counts.reshape(-1)[index] += count
    places = [_place(line, model["density"]) for line in counts]
    bins = tuple(bin for bin, _ in places)
    found = yield tuple(_looked_at(tensor, partial(_in_bins, bins=bins)) for tensor in chosen)
    tasks, magnitudes = np.concatenate(found, axis=1)
    return tuple(_nth(magnitudes[tasks == task], rank) for task, (_, rank) in enumerate(places))


def _looked_at(tensor: Tensor, look: Callable[..., Any]) -> Rows:
    """What ``look`` finds among the coordinates of a matrix."""
    if tensor.ranks:
        return Rows(partial(_of_factors, look, kept=draws(tensor)), of_factors(tensor), whole=True)
    return Rows(partial(_of_models, look), {**of_models(tensor), "shape": tensor.shape}, whole=True)


def _place(counts: npt.NDArray[np.int64], density: float) -> tuple[int, int]:
    """The bin that the threshold lies in, and which of its magnitudes it is, ascending from 0; -1: no threshold."""
    count = int(counts.sum())
    dropped = count - int(count * density) - 1
    sums = np.cumsum(counts)
    bin = int(np.searchsorted(sums, dropped, side="right"))
    if not 0 <= dropped < count:
        return 0, -1
    return bin, dropped - int(sums[bin - 1] if bin else 0)


def _nth(magnitudes: npt.NDArray[np.float64], rank: int) -> float:
    return float(np.sort(magnitudes)[rank]) if rank >= 0 else 0.0


def _histogram(coordinates: tuple[Coordinates, ...]) -> npt.NDArray[np.int64]:
    """(2, any number): task and upper bits as one number, and how many coordinates have these."""
    counts = np.concatenate([np.bincount(_bits(own) >> _SHIFT, minlength=_BINS) for own in coordinates])
    index = np.flatnonzero(counts)
    return np.stack([index, counts[index]])


def _in_bins(coordinates: tuple[Coordinates, ...], bins: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """(2, any number): the task and the magnitude of each coordinate in its task's bin."""
    lines = []
    for task, (own, bin) in enumerate(zip(coordinates, bins, strict=True)):
        inside = np.abs(own.reshape(-1)[_bits(own) >> _SHIFT == bin])
        lines.append(np.stack([np.full(len(inside), task), inside]))
    return np.concatenate(lines, axis=1)


def _bits(coordinates: Coordinates) -> npt.NDArray[np.uint32]:
    return np.abs(coordinates).reshape(-1).view(np.uint32)


def _of_models(
    look: Callable[..., Any], shape: tuple[int, ...], base: Any, models: tuple[Any, ...], **more: Any
) -> Any:
    """What is no number counts as 0 here: the pass that makes the output finds it."""
    start, *others = (finite(x).reshape(shape) for x in (base, *models))
    with one_thread():
        return look(aligned(start, tuple(others), **more).coordinates)


def _of_factors(look: Callable[..., Any], **given: Any) -> Any:
    with one_thread():
        return look(aligned_factors(**given).coordinates)


# --- the merge ------------------------------------------------------------------------------------------------


def of_models(tensor: Tensor) -> dict[str, Any]:
    return {"base": tensor.base, "models": tensor.models, "kept": draws(tensor), **_options(tensor)}


def of_factors(tensor: Tensor) -> dict[str, Any]:
    """Without the draws, which would be made for all of the matrix."""
    return {"changes": tensor.changes, **_options(tensor)}


def draws(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.kept((1 - tensor["drop_rate"],) * tensor.size)


def _options(tensor: Tensor) -> dict[str, Any]:
    turned = tensor["shared"] == "input"
    return {"rate": tensor["drop_rate"], "turned": turned, "tolerance": tensor["tolerance"]}


def is_aligned(tensor: Tensor) -> bool:
    return linear_weight(tensor) and tensor.count > 0


def merge(tensor: Tensor) -> Call | Copy | Whole:
    if tensor.base is not None and is_unchanged(tensor):
        return Copy(tensor.base)
    if not is_aligned(tensor):
        return averaged(tensor)
    rules = {
        "bars": tensor.survey or (), "density": tensor["density"], "elect": tensor["rule"] == "ties",
        "mean": tensor["merge_func"] == "mean",
    }  # fmt: skip
    given = {"base": tensor.base, "scale": tensor["alpha"]}
    if not tensor.ranks:
        return Whole(partial(merged, rules=rules), {**given, **of_models(tensor)})
    function = partial(merged_factors, rules=rules, kept=draws(tensor))
    return Whole(function, {**given, **of_factors(tensor)}, strips=True)


def merged(
    base: Any, models: tuple[Any, ...], scale: float, turned: bool, rules: dict[str, Any], **more: Any
) -> Matrix:  # fmt: skip
    """The merged matrix (m, n) of T models' matrices (m, n)."""
    found = aligned(base, models, turned, **more)
    delta = found.expanded(joined(found.coordinates, **rules))
    return np.asarray(base + scale * (delta.T if turned else delta))


def merged_factors(
    base: Source, changes: tuple[Factors, ...], scale: float, turned: bool, rules: dict[str, Any], **more: Any
) -> Iterator[Matrix]:
    """The same from the models' factors, strip by strip."""
    found = aligned_factors(changes, turned, **more)
    basis, rest = found.factors[0], Aligned(found.factors[1:], found.coordinates)
    right = scale * rest.expanded(joined(found.coordinates, **rules))
    return added(base, right.T, basis.T) if turned else added(base, basis, right)


def joined(
    coordinates: tuple[Coordinates, ...], bars: tuple[float, ...], density: float, elect: bool, mean: bool
) -> Coordinates:
    """Step 3, and C."""
    if not coordinates[0].size:
        return coordinates[0]
    least = bars or tuple(_bar(own, density) for own in coordinates)
    joint = apply(together, {"coordinates": coordinates, "bars": least, "elect": elect, "mean": mean})
    return np.asarray(joint)


def _bar(coordinates: Coordinates, density: float) -> float:
    """One matrix's own threshold."""
    dropped = coordinates.size - int(coordinates.size * density) - 1
    return float(np.partition(np.abs(coordinates), dropped, axis=None)[dropped]) if dropped >= 0 else 0.0


def together(coordinates: Any, bars: Any, elect: bool, mean: bool) -> Any:
    """The mean or the sum of what is kept, with ``elect`` of its sign that outweighs the other."""
    vote = 0
    for own, bar in zip(coordinates, bars):  # noqa: B905
        vote += where(abs(own) >= bar, own, 0)
    total = 0
    count = 0
    for own, bar in zip(coordinates, bars):  # noqa: B905
        counted = (own != 0) & (abs(own) >= bar) & ((own * vote > 0) | (not elect))
        total += where(counted, own, 0)
        count += where(counted, 1, 0)
    return where(mean, total / where(count == 0, 1, count), total)


def holds(tensor: Tensor) -> tuple[int, int]:
    """The operands and the coordinates in fp32; in fp64 the deltas, the joint vectors and their Gram matrix.

    Of factors the shared rows, and the deltas in them.
    """
    if not is_aligned(tensor) or is_unchanged(tensor):
        return 1, 0
    rows, columns = tensor.shape[::-1] if tensor["shared"] == "input" else tensor.shape
    if tensor.ranks:
        rank, each = sum(tensor.ranks), 12 * tensor.size + (38 if tensor["drop_rate"] else 8)
        return holds_factors(tensor, rank * (8 * rows + each * columns + 24 * rank))
    joint = tensor.size * columns
    if rows <= joint:
        squares = 8 * rows * rows
        decomposed = (12 * tensor.size + 4) * tensor.count + 3.5 * squares
        return at_most(tensor, int(decomposed), int((16 * tensor.size + 20.5) * tensor.count + 1.9 * squares))
    return held(tensor, 20 * tensor.size + 10, 3.5, joint)


METHODS = (
    Method(
        name="knots",
        title="KnOTS",
        summary="merge task vectors by TIES in the coordinates of one SVD of all of them",
        advice="For LoRA fine-tunes of one base, whose task vectors share little; tune alpha from 0.3 to 1.",
        citation=Citation(
            "Model merging with SVD to tie the KnOTS", "Stoica et al.", "ICLR 2025",
            "https://arxiv.org/abs/2410.19735",
        ),
        merge=merge,
        survey=survey,
        passes=lambda parameters: (2 if parameters["scope"] == "model" and parameters["density"] < 1 else 0, 0),
        holds=holds,
        low_rank=lambda tensor: is_low_rank(tensor, is_aligned(tensor) and tensor.masks is None),
        random=True,
        parameters=(
            ALPHA,
            Parameter("density", "float", 0.2, "share of each task's coordinates that is kept, the largest ones",
                      low=0, high=1, mergekit=False),
            Parameter("rule", "str", "ties", "ties elects a sign, tv does not", choices=("ties", "tv"),
                      mergekit=False),
            Parameter("merge_func", "str", "mean", "what becomes of the coordinates that are kept",
                      choices=("mean", "sum"), mergekit=False),
            Parameter("drop_rate", "float", 0.0, "share of the coordinates that is dropped at random first (DARE)",
                      low=0, high=0.999, mergekit=False),
            Parameter("shared", "str", "output", "the side whose basis all tasks share", choices=("output", "input"),
                      mergekit=False),
            replace(SCOPE, when=None, defaults=()),
            replace(TOLERANCE, default=1e-6),
            EXCLUDE,
        ),
    ),
)  # fmt: skip

"""Model Breadcrumbs: keep the middle of each task vector, without its smallest entries and its outliers.

Davari and Belilovsky, "Model Breadcrumbs: scaling multi-task model merging with sparse masks", ECCV 2024,
https://arxiv.org/abs/2312.06795. Of n magnitudes |theta_i - theta_0|, in ascending order:

    remove_then_keep    drop the int(n gamma) largest, keep the int(n density) largest of the rest
    keep_then_remove    keep the int(n density) largest, of these drop the int(n gamma) largest
    mergekit            keep int(density n) in all; with a large gamma fewer outliers are dropped, never fewer kept

then theta = theta_0 + lambda sum_i w_i tau_i, in ``breadcrumbs_ties`` with the election of TIES. n is the number of
elements of a tensor, as in the paper, or of a row (``scope: row``), as in the authors' code, which leaves scalars
whole; mergekit has density 1 keep everything, outliers too. Of equal magnitudes the lower index comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.program import ByRow, Call, Copy, Mask, Top, call, row_length
from .family import INFINITY, Selection, added, elected, rescaled, selection
from .ranks import ranks
from .registry import EXCLUDE, Citation, Method, Parameter, Steps, weight_parameter
from .task_arithmetic import INT8_MASK
from .tensors import Tensor, delta

Array = npt.NDArray[Any]


def merge(tensor: Tensor) -> Steps:
    return (yield from _merged(tensor, added))


def merge_ties(tensor: Tensor) -> Steps:
    return (yield from _merged(tensor, elected))


def _merged(tensor: Tensor, combine: Callable[[Tensor, Selection, tuple[Any, ...]], Call]) -> Steps:
    if not tensor.models:
        return Copy(tensor.base)  # type: ignore[arg-type]
    chosen = yield from _selected(tensor)
    factors = yield from rescaled(tensor, chosen)
    return combine(tensor, chosen, factors)


def _selected(tensor: Tensor) -> Steps:
    if tensor.variant == "paper" and not tensor.shape:
        return selection(tensor)
    if _by_row(tensor.shared):
        return selection(tensor, tuple(_mask(tensor, index) for index in range(len(tensor.models))))
    return (yield from _within(tensor, [_band(tensor, index, tensor.count) for index in range(len(tensor.models))]))


def _band(tensor: Tensor, index: int, count: int) -> tuple[int, int]:
    """What is kept of ``count`` magnitudes in ascending order: first position, and the one behind the last."""
    density, gamma = tensor.each["density"][index], tensor.each["gamma"][index]
    kept, removed = int(density * count), int(gamma * count)
    least = max(0, count - kept - removed)
    if tensor.variant == "mergekit":
        return (0, count) if density >= 1 else (least, least + kept)
    return count - kept if tensor["order"] == "keep_then_remove" else least, count - removed


def _mask(tensor: Tensor, index: int) -> Mask:
    first, end = _band(tensor, index, tensor.shape[-1])
    given = {"base": tensor.base, "model": tensor.models[index], "first": first, "end": end}
    return Mask(ByRow(middle_of_row, given, tensor.shape))


def middle_of_row(base: Array, model: Array, first: int, end: int) -> Array:
    """1 where the rank of |delta| in its row lies in [first, end), else 0."""
    rank = ranks(model - base)
    return np.asarray((rank >= first) & (rank < end))


def _within(tensor: Tensor, bands: list[tuple[int, int]]) -> Steps:
    """The selection of the positions [first, end) of each model: the magnitudes at its two ends."""
    count, models = tensor.count, tensor.models
    wanted = [(i, at) for i, (first, end) in enumerate(bands) for at in (first, end) if first < end and 0 < at < count]
    found = yield tuple(Top(call(delta, base=tensor.base, model=models[i]), count - at, last=True) for i, at in wanted)
    edges = dict(zip(wanted, found, strict=True))
    lows = tuple(edges.get((i, first), 0.0) if first < end else INFINITY for i, (first, end) in enumerate(bands))
    return selection(tensor, None, lows, tuple(edges.get((i, end), INFINITY) for i, (_, end) in enumerate(bands)))


def passes(parameters: dict[str, Any]) -> tuple[int, int]:
    return 0, int(not _by_row(parameters)) + int(parameters["rescale"])


def holds(tensor: Tensor) -> tuple[int, int]:
    return (row_length(tensor.shape), 4 * len(tensor.models)) if _by_row(tensor.shared) else (1, 0)


def _by_row(parameters: Mapping[str, Any]) -> bool:
    return bool(parameters["variant"] == "paper" and parameters["scope"] == "row")


CITATION = Citation(
    "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", "Davari, Belilovsky", "ECCV 2024",
    "https://arxiv.org/abs/2312.06795",
)  # fmt: skip

_PAPER = ("variant", ("paper",))

_PARAMETERS = (
    weight_parameter(defaults=(("paper", 1.0),)),
    Parameter("density", "float", 0.2, "share of each task vector that is kept", per_model=True, low=0, high=1,
              defaults=(("mergekit", 1.0),)),
    Parameter("gamma", "float", 0.01, "share of the largest magnitudes that is dropped", per_model=True, low=0, high=1),
    Parameter("lambda", "float", 0.3, "factor of the merged task vector", defaults=(("mergekit", 1.0),)),
    Parameter("rescale", "bool", False, "match the L1 norm of the task vector after thinning"),
    Parameter("order", "str", "remove_then_keep", "whether density counts before or after the outliers are dropped",
              choices=("remove_then_keep", "keep_then_remove"), mergekit=False, when=_PAPER),
    Parameter("scope", "str", "tensor", "whether magnitudes are ranked in a tensor or in each row of the last axis",
              choices=("tensor", "row"), mergekit=False, when=_PAPER),
    INT8_MASK,
    EXCLUDE,
)  # fmt: skip

METHODS = (
    Method(
        name="breadcrumbs",
        title="Model Breadcrumbs",
        summary="drop the smallest and the largest of each task vector, then add",
        advice="For many fine-tunes of one base: density 0.1-0.9, gamma 0.007-0.01, lambda 0.3.",
        citation=CITATION,
        merge=merge,
        passes=passes,
        holds=holds,
        searches=lambda tensor: 0 if _by_row(tensor.shared) else 2 * tensor.size,
        min_models=0,
        parameters=(*_PARAMETERS, Parameter("normalize", "bool", False, "divide by the sum of the weights")),
        variants=("paper", "mergekit"),
    ),
    Method(
        name="breadcrumbs_ties",
        title="Model Breadcrumbs + TIES election",
        summary="drop the smallest and the largest of each task vector, elect signs, merge what agrees",
        advice="As breadcrumbs where signs conflict.",
        citation=CITATION,
        merge=merge_ties,
        passes=passes,
        holds=holds,
        searches=lambda tensor: 0 if _by_row(tensor.shared) else 2 * tensor.size,
        min_models=0,
        parameters=(*_PARAMETERS, Parameter("normalize", "bool", False, "divide by the weights that agree")),
        variants=("paper", "mergekit"),
    ),
)

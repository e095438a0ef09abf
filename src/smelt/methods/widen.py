"""WIDEN: rank, for each model, how much it changed each column, and let what changed most count most.

Yu, Yu, Yu, Huang, Li, "Extend model merging from fine-tuned to pre-trained large language models via weight
disentanglement", 2024, https://arxiv.org/abs/2408.03092. For each matrix (out, in), q columns w_ij of n models:

1. change of length M_ij = | |w_ij| - |w_0j| |, change of direction R_ij = 1 - cos(w_ij, w_0j);
2. per model, s = rank / q over its columns, from 0; of equal changes the lower index ranks lower; for M and R;
3. per column, the softmax of s over the models, but c = ``score_calibration_value`` wherever s exceeds
   t = ``above_average_value_ratio`` times the model's mean s;
4. a_ij = mean of the two scores; w_j = w_0j + sum_i a_ij (w_ij - w_0j).

Ranks take away that one model changed ten times as much as another. The coefficients of a column need not sum to
1. Of a token table the rows (tokens) count as columns; tensors of three and more axes are taken as (first axis,
all others). In vectors each element scores by |delta| itself, unranked.

Both changes come from |w_0|^2, w_0 delta and |delta|^2, summed in fp64, so that small changes are not lost in a
difference of numbers near 1. A column that is zero in the base or the model has no direction: ``zero_column:
neutral`` counts its R as 0 where both are zero, else 1; ``reference`` ranks it above all others, as the authors'
code does (a division by zero).
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.broadcast import PerColumn, PerRow
from ..kernels.program import ByRow, Operand, Rows, Whole, call
from .descent import strips
from .registry import EXCLUDE, Citation, Method, Parameter, Steps
from .task_arithmetic import add_task_vectors
from .tensors import Tensor, identity

Floats = npt.NDArray[np.float64]


def merge(tensor: Tensor) -> Steps:
    given = {"base": tensor.base, "models": tensor.models}
    ratio, calibration = tensor["above_average_value_ratio"], tensor["score_calibration_value"]
    if len(tensor.shape) < 2:
        yield ()
        return Whole(merged_vector, {**given, "ratio": ratio, "calibration": calibration})
    shape = (tensor.shape[0], prod(tensor.shape[1:]))
    tokens = _is_token_table(tensor)
    flat = {"base": _flat(tensor.base, shape), "models": tuple(_flat(model, shape) for model in tensor.models)}
    (sums,) = yield (Rows(row_products, flat) if tokens else Rows(column_products, flat, total=True),)
    lengths, directions = changes(sums, tensor["zero_column"] == "reference")
    found = (scores(ranks(lengths), ratio, calibration) + scores(ranks(directions), ratio, calibration)) / 2
    spread = PerRow if tokens else PerColumn
    return call(add_task_vectors, **given, weights=tuple(spread(column, shape) for column in found.T), scale=1.0)


def _is_token_table(tensor: Tensor) -> bool:
    return len(tensor.shape) == 2 and tensor.role is not None and tensor.role.role == "embedding"


def _flat(operand: Operand | None, shape: tuple[int, int]) -> Any:
    """The same elements as a matrix."""
    assert operand is not None
    return operand if operand.shape == shape else ByRow(identity, {"x": operand}, shape)


# --- how much each model changed each column ----------------------------------------------------------------


def row_products(base: Any, models: tuple[Any, ...]) -> Floats:
    """|w_0|^2, w_0 delta and |delta|^2 of each row and model: (rows, n, 3)."""
    return _products(base, models, "ij,ij->i")


def column_products(base: Any, models: tuple[Any, ...]) -> Floats:
    """The same of each column, over some of the rows: (columns, n, 3)."""
    total = np.zeros((base.shape[1], len(models), 3))
    for part in strips(base.shape):
        total += _products(base[part], tuple(model[part] for model in models), "ij,ij->j")
    return total


def _products(base: Any, models: tuple[Any, ...], sums: str) -> Floats:
    w = base.astype(np.float64)
    square = np.einsum(sums, w, w)
    deltas = (model - w for model in models)
    return np.stack([np.stack([square, np.einsum(sums, w, d), np.einsum(sums, d, d)], axis=-1) for d in deltas], axis=1)


def changes(sums: Floats, undirected_last: bool) -> tuple[Floats, Floats]:
    """Changes of length and of direction, (q, n) each, from the products (q, n, 3).

    ``undirected_last``: a column that is zero in the base or the model has a direction above all others.
    """
    a, b, c = np.moveaxis(sums, -1, 0)
    with np.errstate(all="ignore"):
        square = np.maximum(a + 2 * b + c, 0)  # |w|^2
        length = np.sqrt(square) + np.sqrt(a)
        cosine = (a + b) / np.sqrt(a * square)
        sine2 = np.maximum(c - b * b / a, 0) / square
        direction = np.where(cosine > 0, sine2 / (1 + cosine), 1 - cosine)
        moved = np.where(length > 0, np.abs(2 * b + c) / length, 0)
    one, both = (a == 0) | (square == 0), (a == 0) & (square == 0)
    return moved, np.where(one, np.inf if undirected_last else np.where(both, 0, 1), direction)


# --- what counts how much -----------------------------------------------------------------------------------


def ranks(table: Floats) -> Floats:
    """The rank of each entry within its column of the table, from 0; of equals the first is lowest."""
    found = np.empty(table.shape)
    order = np.argsort(table, axis=0, kind="stable")
    np.put_along_axis(found, order, np.arange(len(table), dtype=np.float64)[:, None], axis=0)
    return found


def scores(ranked: Floats, ratio: float, calibration: float) -> Floats:
    """The models' scores (q, n); compared as whole numbers, so that a rank equal to the mean is not above it."""
    size = len(ranked)
    return np.where(2 * ranked > ratio * (size - 1), calibration, softmax(ranked / size))


def softmax(values: Floats) -> Floats:
    """Over the last axis."""
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def merged_vector(base: Any, models: tuple[Any, ...], ratio: float, calibration: float) -> Floats:
    """The merge of vectors: each element by |delta| itself."""
    deltas = np.stack([np.asarray(model, np.float64) - base for model in models], axis=-1)
    sizes = np.abs(deltas)
    means = sizes.reshape(-1, len(models)).mean(axis=0)
    return np.asarray(base + (np.where(sizes > ratio * means, calibration, softmax(sizes)) * deltas).sum(axis=-1))


METHODS = (
    Method(
        name="widen",
        title="WIDEN, weight disentanglement",
        summary="add task vectors column by column, by how much each model changed the column",
        advice="To join a fine-tune with a model that was trained much further, as on another language.",
        citation=Citation(
            "Extend model merging from fine-tuned to pre-trained large language models via weight disentanglement",
            "Yu et al.", "arXiv 2024", "https://arxiv.org/abs/2408.03092",
        ),
        merge=merge,
        passes=lambda parameters: (0, 1),
        holds=lambda tensor: (prod(tensor.shape[1:]) if len(tensor.shape) > 1 else tensor.count, 40),
        parameters=(
            Parameter("above_average_value_ratio", "float", 1.0, "times a model's mean rank: what lies above gets the "
                      "calibration value; from 2 on nothing does", low=0, mergekit=False),
            Parameter("score_calibration_value", "float", 1.0, "the factor of columns that changed more than that",
                      mergekit=False),
            Parameter("zero_column", "str", "neutral", "the direction of a column of zeros: unchanged or quite "
                      "changed, or above all others", choices=("neutral", "reference"), mergekit=False),
            EXCLUDE,
        ),
    ),
)  # fmt: skip

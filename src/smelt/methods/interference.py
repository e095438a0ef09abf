"""The loss that the WUDI family makes small, as a quadratic form, and its spectrum.

The rows of a linear layer's task vector tau_i lie in the span of that task's inputs, so they stand in for data. How
much a merged task vector W (out, in) disturbs the tasks is

    L(W) = sum_i c_i |(W - T_i) P_i^T|^2,   c_i = 1 / |tau_i|^2,   gradient 2 (W G - H),
    G = sum_i c_i P_i^T P_i  (in, in),      H = sum_i c_i T_i P_i^T P_i  (out, in),

with targets T_i (out, in) and probes P_i (any number of rows, in). G holds all that descent from a start needs beside
the gradient there: the cost of a step does not grow with the number of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..kernels.lapack import square
from .descent import Matrix, Single
from .spectral import descending, triplets
from .tensors import Tensor

#: Eigenvalues below this share of the largest are rounding: no data lies in these directions.
_CUT = 1e-12

#: Blocks of a layer whose matrices multiply the layer's inputs.
_BLOCKS = ("attention.", "mlp.", "expert.", "shared_expert.")


class Term(NamedTuple):
    """One model's part of the loss: c, T and P."""

    weight: float
    target: Matrix
    probe: Matrix


class Spectrum(NamedTuple):
    """The eigenvalues of G that are not rounding, descending, and their vectors (in, as many)."""

    values: Matrix
    vectors: Matrix


@dataclass(frozen=True, eq=False)
class Quadratic:
    """H, and G: as itself, or (``few``) as Z with G = Z^T Z where the probes have fewer rows than columns."""

    pull: Matrix
    gram: Matrix
    few: bool

    def spectrum(self) -> Spectrum:
        """The eigenvectors with an eigenvalue that is not rounding: signs, and turns within equal ones, are free.

        ``gram`` is used up.
        """
        if not self.few:
            return spectrum_of(self.gram)
        found = triplets(self.gram)
        return _significant(found.sigma**2, found.right)


def moved(pull: Matrix, start: Matrix, spectrum: Spectrum, shares: Matrix) -> Matrix:
    """Rows of ``start`` after its share of the way to the minimum along each vector, by those of H; elsewhere it stays.

    Shares at the end that are 0 cost nothing.
    """
    count = int(np.flatnonzero(shares).max(initial=-1)) + 1
    vectors = spectrum.vectors[:, :count]
    way = pull @ vectors
    way /= spectrum.values[:count]
    way -= start @ vectors
    way *= shares[:count]
    found = way @ vectors.T
    found += start
    return np.asarray(found)


def spectrum_of(gram: Matrix) -> Spectrum:
    """That of G (in, in) itself, which is used up."""
    return _significant(*descending(gram))


def _significant(values: Matrix, vectors: Matrix) -> Spectrum:
    count = int((values > _CUT * values.max(initial=0)).sum())
    return Spectrum(values[:count], vectors[:, :count])


def quadratic(terms: Iterator[Term], rows: int, shape: tuple[int, int]) -> Quadratic:
    """The loss of ``terms``, whose probes have ``rows`` rows together, on matrices of this shape."""
    few = rows < shape[1]
    pull, gram, stacked = np.zeros(shape), square(0 if few else shape[1]), [np.zeros((0, shape[1]))]
    for weight, target, probe in terms:
        scaled = sqrt(weight) * probe
        own = None if few else scaled.T @ scaled
        if own is None:
            stacked.append(scaled)
        else:
            gram += own
        pull += target @ own if own is not None and 2 * len(probe) >= shape[1] else (target @ scaled.T) @ scaled
    return Quadratic(pull, np.concatenate(stacked) if few else gram, few)


def slope(terms: Iterable[Term], rows: int, start: Matrix) -> Callable[[Single], Single]:
    """The gradient of L as a function of the way from ``start`` (out, in): at the start in fp64, beyond it in fp32.

    The probes have ``rows`` rows together: where these are few, G is never made, but multiplied by as Z^T Z.
    """
    columns = start.shape[1]
    few = 2 * rows < columns
    fixed, gram = np.zeros_like(start), np.zeros((0 if few else columns,) * 2, np.float32)
    stacked = []
    for weight, target, probe in terms:
        scaled, gap = sqrt(2 * weight) * probe, start - target
        narrow = np.asarray(scaled, np.float32)
        if few:
            stacked.append(narrow)
        else:
            gram += narrow.T @ narrow
        fixed += gap @ (scaled.T @ scaled) if 2 * len(probe) >= columns else (gap @ scaled.T) @ scaled
    return _slope(np.asarray(fixed, np.float32), np.concatenate(stacked) if stacked else gram, few)


def _slope(fixed: Single, gram: Single, few: bool) -> Callable[[Single], Single]:
    def gradient(way: Single) -> Single:
        pushed = (way @ gram.T) @ gram if few else way @ gram
        pushed += fixed
        return np.asarray(pushed, np.float32)

    return gradient


def task_vector(base: npt.NDArray[np.float32], model: npt.NDArray[np.float32]) -> Matrix:
    """Fine-tuned minus base, as a matrix (first axis, the rest)."""
    change = np.subtract(model, base, dtype=np.float64)
    return change.reshape(len(change), -1)


def total_of(changes: Iterable[Matrix]) -> Matrix:
    """Their sum, one at a time, in the memory of the first."""
    rest = iter(changes)
    total = next(rest)
    for change in rest:
        total += change
    return total


def squared_norm(matrix: Matrix) -> float:
    """|A|_F^2."""
    return float(np.vdot(matrix, matrix))


def linear_weight(tensor: Tensor) -> bool:
    """Whether it is a matrix of an attention block, a feed-forward block or an expert, or of unknown use."""
    role = "other" if tensor.role is None else tensor.role.role
    return len(tensor.shape) == 2 and role.startswith((*_BLOCKS, "other"))

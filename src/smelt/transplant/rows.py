"""Rows for tokens that a model does not have: the approximations, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import MissingExtra
from ..kernels.random import key_of
from .neighbours import Neighbours
from .options import Options
from .pursuit import Pursuit
from .vocabulary import Vocabulary

Array = npt.NDArray[Any]
Matrix = npt.NDArray[np.float64]


def blocks(rows: Array) -> Iterator[Matrix]:
    """Stored rows in fp64, some at a time."""
    return (rows[start : start + 4096].astype(np.float64) for start in range(0, len(rows), 4096))


def mean_of(rows: Array) -> Matrix:
    """The mean row, in fp64."""
    return np.asarray(sum(block.sum(axis=0) for block in blocks(rows)) / len(rows))


@dataclass(frozen=True, eq=False)
class Space:
    """The model's matrix and the donor's, and the rows in them that mean the same.

    Attributes
    ----------
    name: of the model's tensor.
    own, donor: stored values, a row for each token.
    shared: pairs (row in ``own``, row in ``donor``), shape (N, 2), in the order of the donor.
    head: whether it is the output matrix.
    """

    name: str
    own: Array
    donor: Array
    shared: npt.NDArray[np.int64]
    head: bool
    vocabularies: tuple[Vocabulary, Vocabulary]
    options: Options

    @cached_property
    def atoms(self) -> Array:
        """The donor's rows of shared tokens, in fp32."""
        return self.donor[self.shared[:, 1]].astype(np.float32)

    @cached_property
    def mean(self) -> Matrix:
        """Of all rows of the model's matrix."""
        return mean_of(self.own)

    def combined(self, places: Array, weights: Matrix) -> Matrix:
        """A combination of the model's rows of shared tokens."""
        return np.asarray(weights @ self.own[self.shared[places, 0]].astype(np.float64))

    def normals(self, token: int, width: int, stream: int = 0) -> Matrix:
        """Standard normal numbers for one token of this matrix, whatever else is drawn."""
        high, low = key_of(self.options.seed, self.name, stream)
        bits = np.random.Philox(key=[high << 32 | low, token])
        return np.random.Generator(bits).standard_normal(width)


#: From a space and donor ids to rows of the model's width.
Approximation = Callable[[Space, Sequence[int]], Matrix]


def omp(space: Space, tokens: Sequence[int]) -> Matrix:
    """A sparse combination of shared tokens in the donor's space, rebuilt in the model's."""
    found = Pursuit(space.atoms)(space.donor[tokens], space.options.count)
    return np.stack([space.combined(places, weights) for places, weights in found])


def common_interpolation(space: Space, tokens: Sequence[int]) -> Matrix:
    """A combination of the nearest shared tokens in the donor's space, rebuilt in the model's."""
    options = space.options
    nearest = Neighbours(space.atoms, options.count, options.is_cosine, options.scheme)
    parts = [nearest(space.donor[tokens[start : start + 64]]) for start in range(0, len(tokens), 64)]
    return np.stack([space.combined(places, weights) for part in parts for places, weights in part])


def subword(space: Space, tokens: Sequence[int]) -> Matrix:
    """From the model's rows of the pieces that its own tokenizer cuts the token's text into."""
    own, donor = space.vocabularies
    cut = _tokenizer(own)
    names = {index: token for token, index in donor.ids.items()}
    pieces = [cut(donor.text_of(names[token])) for token in tokens]
    return np.stack([_of_pieces(space, [p for p in found if p < len(space.own)]) for found in pieces])


def _tokenizer(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtra("the method subword", "hf") from error
    tokenizer = Tokenizer.from_str(vocabulary.text)
    # Sentencepiece puts a space in front by itself.
    lead = " " if vocabulary.family == "sentencepiece" else ""
    return lambda text: list(tokenizer.encode(text.removeprefix(lead) or text, add_special_tokens=False).ids)


def _of_pieces(space: Space, pieces: list[int]) -> Matrix:
    """The last piece counts most where a token is read, the first where it is written."""
    if not pieces:
        return space.mean
    rows = space.own[pieces].astype(np.float64)
    ordered = rows[::-1] if space.head else rows
    rank = np.arange(1.0, len(rows) + 1)
    how = space.options.pieces
    if how == "first_last":
        return np.asarray(ordered[-1])
    if how == "weighted_mean":
        return np.asarray(rank @ ordered / rank.sum())
    return np.asarray(rows.sum(axis=0) if how == "sum" else rows.mean(axis=0))


def mean(space: Space, tokens: Sequence[int]) -> Matrix:
    """The mean of all rows."""
    return np.tile(space.mean, (len(tokens), 1))


def zero(space: Space, tokens: Sequence[int]) -> Matrix:
    """Zeros."""
    return np.zeros((len(tokens), space.own.shape[1]))


def randn(space: Space, tokens: Sequence[int]) -> Matrix:
    """Standard normal numbers: far larger than rows usually are."""
    return np.stack([space.normals(token, space.own.shape[1]) for token in tokens])


def john_hewitt(space: Space, tokens: Sequence[int]) -> Matrix:
    """A normal draw with the rows' mean and covariance (Hewitt, "Initializing new word embeddings", 2021)."""
    centred = (block - space.mean for block in blocks(space.own))
    values, vectors = np.linalg.eigh(sum(block.T @ block for block in centred) / len(space.own))
    spread = vectors * np.sqrt(np.maximum(values, 0.0))
    return np.stack([space.mean + spread @ space.normals(token, len(values)) for token in tokens])


def landmark_pca(space: Space, tokens: Sequence[int]) -> Matrix:
    """Principal components of both spaces, aligned by the rotation that fits the shared tokens best."""
    landmarks = space.own[space.shared[:, 0]].astype(np.float64), space.atoms.astype(np.float64)
    size = min(len(space.shared), *(part.shape[1] for part in landmarks))
    (own_mean, own_axes), (mean_there, axes_there) = (_components(part, size) for part in landmarks)
    here, there = (landmarks[0] - own_mean) @ own_axes, (landmarks[1] - mean_there) @ axes_there
    left, _, right = np.linalg.svd(there.T @ here)
    moved = (space.donor[tokens].astype(np.float64) - mean_there) @ axes_there @ (left @ right)
    return np.asarray(own_mean + moved @ own_axes.T)


def _components(rows: Matrix, size: int) -> tuple[Matrix, Matrix]:
    centre = rows.mean(axis=0)
    _, vectors = np.linalg.eigh((rows - centre).T @ (rows - centre))
    return centre, vectors[:, ::-1][:, :size]


APPROXIMATIONS: dict[str, Approximation] = {
    function.__name__: function
    for function in (omp, common_interpolation, subword, mean, zero, randn, john_hewitt, landmark_pca)
}

#: Those that look at the donor's rows, and need shared tokens.
BY_DONOR = (omp, common_interpolation, landmark_pca)

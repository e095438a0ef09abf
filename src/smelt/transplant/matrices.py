"""The new embedding and head: shared rows bit by bit, the others approximated."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputRejected
from ..kernels.blas import one_thread
from ..kernels.dtypes import rounded
from .matching import Match, match
from .options import Options
from .rows import APPROXIMATIONS, BY_DONOR, Space, blocks, mean_of
from .vocabulary import Vocabulary

Array = npt.NDArray[Any]
Matrix = npt.NDArray[np.float64]

#: Tokens of one piece of work: what they share does not depend on the number of threads.
_PIECE = 2048

#: Untrained rows: shorter than this share of all, or nearer to the mean of the unused rows than this share and
#: than this cosine (after Land and Bartolo, "Fishing for Magikarp", EMNLP 2024).
_SHORT, _NEAR, _COSINE = 0.01, 0.99, 0.5


@dataclass(frozen=True)
class Transplanted:
    """A new matrix, and how many of its rows are of shared tokens, of similar ones, approximated, and empty."""

    rows: Array
    same: int
    like: int
    approximated: int
    empty: int
    duplicates: int

    def __str__(self) -> str:
        twice = f"; {self.duplicates} tokens of the model mean the same as another" if self.duplicates else ""
        return (
            f"{self.same} rows of shared tokens, {self.like} of similar ones, {self.approximated} approximated, "
            f"{self.empty} empty{twice}"
        )


def transplanted(
    name: str, dtype: str, own: Array, donor: Array, vocabularies: tuple[Vocabulary, Vocabulary], options: Options,
    *, head: bool, threads: int,
) -> Transplanted:  # fmt: skip
    """The matrix ``own`` (stored values, a row for each token) with the rows of the donor's vocabulary."""
    ours, theirs = vocabularies
    found = match(ours, len(own), theirs, options.rules(head))
    untrained: set[int] = set()
    if options.magikarp:
        found, untrained = _without_untrained(found, own, donor, vocabularies)
    both = [(row, index) for index, row in found.same.items() if index < len(donor)]
    space = Space(name, own, donor, np.array(both, np.int64).reshape(-1, 2), head, vocabularies, options)
    if APPROXIMATIONS[options.method] in BY_DONOR and not both:
        raise InputRejected(f"{name}: the two vocabularies share no token: use the method subword")
    rows = np.zeros((theirs.size, own.shape[1]), own.dtype)
    for part in (found.same, found.like):
        rows[list(part)] = own[list(part.values())]
    missing = sorted(set(theirs.ids.values()) - set(found.same) - set(found.like) - untrained)
    wanted = [index for index in missing if index < len(donor)]
    rows[wanted] = rounded(_approximated(space, wanted, threads), dtype)
    empty = len(rows) - len(found.same) - len(found.like) - len(wanted)
    padded = np.concatenate([rows, _padding(rows, options.pad_to_multiple_of, dtype)])
    return Transplanted(padded, len(found.same), len(found.like), len(wanted), empty, found.duplicates)


def _approximated(space: Space, tokens: Sequence[int], threads: int) -> Matrix:
    """A row for each token, in pieces of fixed length on as many threads as are given."""
    make = APPROXIMATIONS[space.options.method]
    pieces = [tokens[start : start + _PIECE] for start in range(0, len(tokens), _PIECE)]
    if make in BY_DONOR:
        space.atoms  # noqa: B018 - made once, before the threads would each do so
    with one_thread(), ThreadPoolExecutor(threads, "smelt") as pool:
        parts = list(pool.map(lambda piece: _altered(space, make(space, piece), piece), pieces))
    return np.concatenate(parts) if parts else np.zeros((0, space.own.shape[1]))


def _altered(space: Space, rows: Matrix, tokens: Sequence[int]) -> Matrix:
    """Noise first, then the scale."""
    options = space.options
    if options.new_vocab_noise:
        noise = np.stack([space.normals(token, rows.shape[1], stream=1) for token in tokens])
        rows = rows + options.new_vocab_noise * noise
    return rows * options.new_vocab_scale


def _padding(rows: Array, multiple: int, dtype: str) -> Array:
    """Rows that no token uses: the mean of the others."""
    return np.tile(rounded(mean_of(rows), dtype), (-len(rows) % multiple, 1))


# --- untrained rows -------------------------------------------------------------------------------------


def _without_untrained(
    found: Match, own: Array, donor: Array, vocabularies: tuple[Vocabulary, Vocabulary]
) -> tuple[Match, set[int]]:
    """Matches without the model's untrained rows; and the donor ids that are untrained in both (rows of zeros)."""
    bad, bad_there = (_untrained(part, known) for part, known in zip((own, donor), vocabularies, strict=True))
    same = {index: row for index, row in found.same.items() if row not in bad}
    like = {index: row for index, row in found.like.items() if row not in bad}
    both = {index for index, row in found.same.items() if row in bad and index in bad_there}
    return Match(same, like, found.duplicates), both


def _untrained(matrix: Array, vocabulary: Vocabulary) -> set[int]:
    """The ids whose rows look as if no training had touched them."""
    norms = np.concatenate([np.linalg.norm(block, axis=1) for block in blocks(matrix)])
    used = np.array(sorted(index for index in vocabulary.ids.values() if index < len(matrix)))
    bad = norms[used] < np.quantile(norms[used], _SHORT)
    unused = np.setdiff1d(np.arange(len(matrix)), used)
    if len(unused):
        mean = mean_of(matrix[unused])
        scale = norms[used] * np.linalg.norm(mean)
        products = np.concatenate([block @ mean for block in blocks(matrix)])[used]
        cosine = products / np.where(scale > 0, scale, 1.0)
        bad |= cosine > max(float(np.quantile(cosine, _NEAR)), _COSINE)
    return set(used[bad].tolist())

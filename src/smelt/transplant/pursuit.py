"""Orthogonal matching pursuit: a vector as a combination of few atoms, chosen one by one.

Goddard and Fernandes Neto, "Training-free tokenizer transplantation via orthogonal matching pursuit", 2025,
https://arxiv.org/abs/2506.06607: k times, take the atom with the largest |<residual, atom>| and project again.

Computed in the space of inner products (after Rubinstein et al., "Batch orthogonal matching pursuit", 2008):
with q_1, q_2, ... the chosen atoms made orthonormal, u_j[n] = <q_j, atom n> and alpha[n] = <residual, atom n>,

    v = G[i] - sum_j u_j[i] u_j,    u = v / sqrt(v[i]),    alpha <- alpha - alpha[i] / sqrt(v[i]) u

for the atom i that is chosen next needs one row of the atoms' Gram matrix G, and popular atoms are chosen again and
again; a step costs N t multiplications where residuals would cost N d. Choices are made in fp32; the coefficients
of the atoms that were chosen are solved for in fp64.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Matrix = npt.NDArray[np.float64]

#: Targets at once, which share products: at most so many, with vectors u of at most so many bytes.
_BATCH, _WORK = 64, 1 << 29

#: A target is finished when no |alpha| exceeds this share of the first one; an atom is dependent on those
#: chosen before when this share of its squared norm, or less, is left.
_FINISHED, _DEPENDENT = 1e-6, 1e-6

#: Bytes of rows of G that are kept, those used last.
_CACHE = 1 << 30


class Pursuit:
    """Atoms (N, d), and the rows of their Gram matrix that were needed so far. Not for several threads."""

    def __init__(self, atoms: Array) -> None:
        self._atoms = np.ascontiguousarray(atoms, np.float32)
        self._most = max(_BATCH, _CACHE // (4 * len(atoms)))
        self._rows: dict[int, Array] = {}

    def __call__(self, targets: Array, k: int) -> list[tuple[Array, Matrix]]:
        """For each of the targets (T, d) the chosen atoms' indices and coefficients, at most k.

        Of equal inner products the first atom is taken.
        """
        size = max(1, min(_BATCH, _WORK // (4 * k * len(self._atoms))))
        starts = range(0, len(targets), size)
        return [found for start in starts for found in self._batch(targets[start : start + size], k)]

    def _batch(self, targets: Array, k: int) -> list[tuple[Array, Matrix]]:
        states = [_State(alpha, k) for alpha in targets.astype(np.float32) @ self._atoms.T]
        for _ in range(min(k, len(self._atoms))):
            places = [state.best() for state in states]
            self._fetch(sorted({place for place in places if place is not None}))
            for state, place in zip(states, places, strict=True):
                if place is not None:
                    state.take(place, self._rows[place])
        return [self._solved(target, state.chosen) for target, state in zip(targets, states, strict=True)]

    def _fetch(self, places: list[int]) -> None:
        """Have the rows of G for these atoms."""
        rows = {place: self._rows.pop(place) for place in places if place in self._rows}
        missing = [place for place in places if place not in rows]
        if missing:
            rows |= zip(missing, map(np.copy, self._atoms[missing] @ self._atoms.T), strict=True)
        for place in list(islice(self._rows, max(0, len(self._rows) + len(rows) - self._most))):
            del self._rows[place]
        self._rows |= rows

    def _solved(self, target: Array, chosen: list[int]) -> tuple[Array, Matrix]:
        atoms = self._atoms[chosen].astype(np.float64)
        right = atoms @ target.astype(np.float64)
        return np.asarray(chosen, np.int64), np.asarray(np.linalg.solve(atoms @ atoms.T, right), np.float64)


class _State:
    """One target on its way."""

    def __init__(self, alpha: Array, k: int) -> None:
        self.chosen: list[int] = []
        self._alpha = alpha
        self._u = np.empty((k, len(alpha)), np.float32)
        self._least = _FINISHED * float(np.abs(alpha).max(initial=0))

    def best(self) -> int | None:
        """The atom to take next; None when the target is finished."""
        place = int(np.abs(self._alpha).argmax())
        return place if abs(self._alpha[place]) > self._least else None

    def take(self, place: int, row: Array) -> None:
        u = self._u[: len(self.chosen)]
        rest = row - u[:, place] @ u
        if rest[place] <= _DEPENDENT * row[place]:
            self._least = np.inf
            return
        root = np.sqrt(rest[place])
        self._u[len(self.chosen)] = rest / root
        self._alpha = self._alpha - (self._alpha[place] / root) * self._u[len(self.chosen)]
        self.chosen.append(place)

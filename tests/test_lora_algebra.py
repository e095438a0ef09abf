"""Sums of low-rank products in factored form, against the matrices themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smelt.adapters.factored import EVERYTHING, Term, apart, core_of, outside, rounding, summed
from smelt.adapters.lowrank import Limits, LowRank, factors


def term(m: int, n: int, rank: int, scale: float, seed: int = 0) -> Term:
    draw = np.random.default_rng([seed, m, n, rank])
    return Term(draw.standard_normal((m, rank)).astype("f4"), draw.standard_normal((rank, n)).astype("f4"), scale)


def dense(terms: list[Term]) -> Any:
    return sum(t.factor * (t.b.astype("f8") @ t.a.astype("f8")) for t in terms)


def matrix(found: LowRank) -> Any:
    return (found.left * found.sigma) @ found.right


SHAPES = [(40, 30), (30, 2100), (6, 50), (50, 6), (5, 4), (1, 7)]
MIXED = [(3, 0.7), (5, -1.3), (1, 2.0)]


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_sum_itself(m: int, n: int) -> None:
    """Different ranks and signs of scale, also where the ranks together exceed the matrix."""
    terms = [term(m, n, rank, scale, seed) for seed, (rank, scale) in enumerate(MIXED)]
    found, wanted = summed(terms, EVERYTHING), dense(terms)
    assert matrix(found) == pytest.approx(wanted, rel=1e-12, abs=1e-12 * np.linalg.norm(wanted))
    assert found.rank == min(m, n, 9)
    assert found.norm == pytest.approx(np.linalg.norm(wanted))
    assert np.abs(found.left.T @ found.left - np.eye(found.rank)).max() < 1e-9


@pytest.mark.parametrize(("m", "n"), SHAPES[:4])
def test_the_nearest_of_a_rank_and_of_an_error(m: int, n: int) -> None:
    terms = [term(m, n, rank, scale, seed) for seed, (rank, scale) in enumerate(MIXED)]
    spectrum = np.linalg.svd(dense(terms))[1]
    cut = summed(terms, Limits(4))
    assert np.linalg.norm(dense(terms) - matrix(cut)) == pytest.approx(np.linalg.norm(spectrum[4:]))
    for error in (0.5, 0.2, 0.01):
        tails = [np.linalg.norm(spectrum[k:]) / np.linalg.norm(spectrum) for k in range(len(spectrum) + 1)]
        assert summed(terms, Limits(1000, error)).rank == next(k for k, tail in enumerate(tails) if tail <= error)


def test_what_cancels_and_what_repeats_takes_no_rank() -> None:
    a = term(40, 30, 4, 1.5)
    assert summed([a, a._replace(scaling=-1.5)], EVERYTHING).rank == 0
    assert summed([a, a, a], EVERYTHING).rank == 4
    assert summed([a, a._replace(scaling=0.0)], EVERYTHING).rank == 4
    assert summed([a._replace(b=0 * a.b)], EVERYTHING).rank == 0
    shared = Term(term(40, 30, 4, 1, seed=2).b, a.a, 0.3)
    assert summed([a, shared], EVERYTHING).rank == 4


def test_signs_are_fixed() -> None:
    """Neither the order of the adapters nor the signs inside their factors turn a direction round."""
    terms = [term(30, 20, 3, 0.5, seed) for seed in range(3)]
    turned = [Term(-t.b, -t.a, t.scaling) for t in reversed(terms)]
    one, other = summed(terms, Limits(5)), summed(turned, Limits(5))
    assert one.left == pytest.approx(other.left, abs=1e-9)
    assert one.right == pytest.approx(other.right, abs=1e-9)
    assert (one.right[range(5), np.abs(one.right).argmax(axis=1)] > 0).all()


def test_the_distance_that_is_told() -> None:
    terms = [term(30, 20, 3, 0.5, seed) for seed in range(3)]
    found, b, a = summed(terms, Limits(5)), term(30, 20, 2, 1).b, term(30, 20, 2, 1).a
    assert apart(found, b, a) == pytest.approx(np.linalg.norm(matrix(found) - b @ a), rel=1e-6)
    assert apart(found, found.left * found.sigma, found.right) < 1e-7 * found.norm


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_what_rounding_changes(dtype: str) -> None:
    """Also where it is far below what a difference of squares could tell."""
    found = summed([term(30, 20, 3, 0.5, seed) for seed in range(3)], Limits(5))
    b, a = factors(found, True, dtype)
    wanted = np.linalg.norm(matrix(found) - b.astype("f8") @ a.astype("f8"))
    assert rounding(found, b, a) == pytest.approx(wanted, rel=1e-5)
    assert wanted > 1e-9 * found.norm


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_nothing_is_lost_in_the_core(m: int, n: int) -> None:
    terms = [term(m, n, rank, scale, seed) for seed, (rank, scale) in enumerate(MIXED)]
    space = core_of(terms)
    for one, small in zip(terms, space.terms, strict=True):
        assert matrix(outside(space, small, EVERYTHING)) * one.weight == pytest.approx(dense([one]), rel=1e-9, abs=1e-9)
    assert max(space.terms[0].shape) <= 9

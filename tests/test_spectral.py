"""Singular triplets and polar factors, and the laws of the methods that merge by them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import smelt
from smelt.kernels import lapack
from smelt.methods.r_tsvm import shares
from smelt.methods.spectral import combined, descending, orthogonal_sum, polar, spectrum_and_polar, triplets
from tests.small_models import Arrays
from tests.tensors import assert_close

SHAPES = [(9, 5), (5, 9), (6, 6), (1, 4), (4, 1)]


def drawn(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def conditioned(shape: tuple[int, int], kappa: float) -> Any:
    """Singular values from 1 down to 1 / kappa."""
    left, _, right = np.linalg.svd(drawn(*shape), full_matrices=False)
    return (left * np.geomspace(1, 1 / kappa, min(shape))) @ right


# --- the shared numerics --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kappa", [1e2, 1e8])
def test_triplets_are_those_of_an_svd(shape: tuple[int, int], kappa: float) -> None:
    matrix = conditioned(shape, kappa)
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    for count in range(1, min(shape) + 1):
        found = triplets(matrix, count)
        np.testing.assert_allclose(found.sigma, sigma[:count], rtol=1e-6)
        np.testing.assert_allclose(found.matrix(), (left * sigma)[:, :count] @ right[:count], atol=1e-8)
        np.testing.assert_allclose(found.left.T @ found.left, np.eye(count), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kappa", [1e2, 1e8])
def test_the_polar_factor_is_that_of_an_svd(shape: tuple[int, int], kappa: float) -> None:
    matrix = conditioned(shape, kappa)
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    found, factor = spectrum_and_polar(matrix)
    np.testing.assert_allclose(factor, left @ right, atol=1e-6)
    np.testing.assert_allclose(found, sigma, rtol=1e-6)
    np.testing.assert_allclose(polar(matrix.T), factor.T, atol=1e-6)


def test_what_has_no_direction_is_left_out() -> None:
    """A partial isometry of the rank that the matrix has; nothing of a matrix of zeros."""
    thin = drawn(8, 3) @ drawn(3, 7)
    factor = polar(thin)
    assert triplets(thin).rank == 3
    np.testing.assert_allclose(np.linalg.svd(factor, compute_uv=False), [1, 1, 1, 0, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(factor @ factor.T @ thin, thin, atol=1e-12)
    assert not polar(np.zeros((4, 6))).any()
    assert triplets(np.zeros((4, 6))).rank == 0


def test_tolerance_says_what_counts_as_zero() -> None:
    noisy = drawn(8, 3) @ drawn(3, 7) + 1e-6 * drawn(8, 7)
    assert (triplets(noisy).rank, triplets(noisy, tolerance=1e-3).rank) == (7, 3)
    assert np.linalg.matrix_rank(polar(noisy, 1e-3)) == 3


def test_joint_vectors_are_made_orthogonal() -> None:
    joint = combined([triplets(drawn(12, 10, seed=seed), 3) for seed in range(3)], orthogonal=True)
    for vectors in (joint.left, joint.right):
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(9), atol=1e-10)


# --- laws of the methods: merges of one matrix and one vector, the base is zero ---------------------------


def merged(method: str, deltas: list[Any], **parameters: Any) -> Any:
    """The merged delta of matrices."""
    models: list[Arrays] = [{"w": np.asarray(delta, np.float64)} for delta in deltas]
    base = {"w": np.zeros_like(models[0]["w"])}
    return smelt.merge_tensors(method, models, base, parameters=parameters)["w"]


DELTAS = [drawn(10, 7, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("method", ["tsv", "iso"])
def test_a_change_of_bases_changes_the_result_alike(method: str) -> None:
    left, right = np.linalg.qr(drawn(10, 10))[0], np.linalg.qr(drawn(7, 7))[0]
    turned = merged(method, [left @ delta @ right.T for delta in DELTAS])
    np.testing.assert_allclose(turned, left @ merged(method, DELTAS) @ right.T, atol=1e-7)


@pytest.mark.parametrize("method", ["tsv", "iso", "r_tsvm"])
def test_models_may_come_in_any_order(method: str) -> None:
    np.testing.assert_allclose(merged(method, DELTAS), merged(method, DELTAS[::-1]), atol=1e-9)


@pytest.mark.parametrize("method", ["tsv", "iso", "r_tsvm"])
def test_vectors_and_named_matrices_take_the_mean(method: str) -> None:
    base: Arrays = {name: np.zeros(shape, np.float32) for name, shape in SMALL.items()}
    models = [{name: drawn(*shape, seed=seed).astype(np.float32) for name, shape in SMALL.items()} for seed in (1, 2)]
    out = smelt.merge_tensors(method, models, base, parameters={"alpha": 0.5, "average": (r"head\.",)})
    assert_close(out, {name: 0.25 * (models[0][name] + models[1][name]) for name in base})


SMALL = {"norm": (5,), "convolution": (3, 2, 2), "head.weight": (4, 4)}


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_copies_of_a_task_give_its_truncated_delta(copies: int) -> None:
    """Which is where the reference leaves directions to chance."""
    expected = triplets(DELTAS[0], 7 // copies).matrix()
    np.testing.assert_allclose(merged("tsv", [DELTAS[0]] * copies), expected, atol=1e-12)


def test_a_task_that_learnt_nothing_does_not_bend_the_others() -> None:
    nothing = np.zeros_like(DELTAS[0])
    both = merged("tsv", DELTAS[:2], rank_fraction=0.3)
    np.testing.assert_allclose(merged("tsv", [*DELTAS[:2], nothing], rank_fraction=0.3), both, atol=1e-12)
    adapter = drawn(10, 1) @ drawn(1, 7)
    alone = merged("tsv", [adapter, nothing, nothing])
    np.testing.assert_allclose(alone, adapter, atol=1e-12)


def test_weights_scale_the_singular_values() -> None:
    base = {"w": np.zeros((10, 7))}
    models = [{"w": delta} for delta in DELTAS[:2]]
    out = smelt.merge_tensors("tsv", models, base, per_model={"weight": [2.0, -1.0]})
    np.testing.assert_allclose(out["w"], merged("tsv", [2 * DELTAS[0], -DELTAS[1]]), atol=1e-9)


def test_more_tasks_than_rows_are_averaged_unless_a_rank_is_wanted() -> None:
    deltas = [drawn(2, 9, seed=seed) for seed in range(3)]
    np.testing.assert_allclose(merged("tsv", deltas), np.mean(deltas, axis=0), atol=1e-12)
    wanted = merged("tsv", deltas, rank_fraction=0.5)
    assert np.abs(wanted - np.mean(deltas, axis=0)).max() > 0.1


@pytest.mark.parametrize("variant", ["iso_c", "iso_cts"])
def test_isotropic_merges_have_one_singular_value(variant: str) -> None:
    """Which is the mean over those of the sum, or of the chosen directions; scaling all tasks scales it."""
    out = merged("iso", DELTAS, variant=variant)
    values = np.linalg.svd(out, compute_uv=False)
    np.testing.assert_allclose(values, values[0], rtol=1e-9)
    np.testing.assert_allclose(merged("iso", [3 * delta for delta in DELTAS], variant=variant), 3 * out, atol=1e-9)
    if variant == "iso_c":
        np.testing.assert_allclose(values[0], np.linalg.svd(sum(DELTAS), compute_uv=False).mean())


def test_iso_cts_of_common_directions_alone_is_iso_c() -> None:
    alone = merged("iso", DELTAS, variant="iso_cts", common_space_fraction=1.0)
    np.testing.assert_allclose(alone, merged("iso", DELTAS), atol=1e-10)


@pytest.mark.parametrize("variant", ["iso_c", "iso_cts"])
def test_iso_of_adapters_has_their_rank_and_no_more(variant: str) -> None:
    adapters = [drawn(10, 1, seed=seed) @ drawn(1, 7, seed=seed) for seed in range(3)]
    plain, scaled = (merged("iso", adapters, variant=variant, sigma_over=over) for over in ("all", "rank"))
    moved = merged("iso", [adapter + 1e-13 * delta for adapter, delta in zip(adapters, DELTAS, strict=True)],
                   variant=variant, tolerance=1e-6)  # fmt: skip
    assert np.linalg.matrix_rank(plain, 1e-9) == 3
    np.testing.assert_allclose(moved, plain, atol=1e-9)
    np.testing.assert_allclose(scaled, plain * 7 / 3, atol=1e-9)


def test_beta_goes_from_the_sum_to_the_level() -> None:
    np.testing.assert_allclose(merged("iso", DELTAS, beta=0.0), sum(DELTAS), atol=1e-12)
    half = merged("iso", DELTAS, beta=0.5)
    np.testing.assert_allclose(half, 0.5 * sum(DELTAS) + 0.5 * merged("iso", DELTAS), atol=1e-12)


def test_more_tasks_than_directions_leave_iso_cts_the_common_ones() -> None:
    deltas = [drawn(2, 9, seed=seed) for seed in range(5)]
    for fraction in (0.0, 0.5, 1.0):
        out = merged("iso", deltas, variant="iso_cts", common_space_fraction=fraction)
        np.testing.assert_allclose(out, merged("iso", deltas), atol=1e-10)


def test_r_tsvm_without_its_rules_is_tsv() -> None:
    plain = merged("r_tsvm", DELTAS, weighting="none", rank_rule="uniform")
    np.testing.assert_allclose(plain, merged("tsv", DELTAS), atol=1e-13)


def test_r_tsvm_weighs_outliers_whatever_the_scale() -> None:
    """The weights of two tasks that live on different rows are seen as factors of these."""
    deltas = [np.zeros((12, 9)) for _ in range(2)]
    deltas[0][:6], deltas[1][6:] = 0.01 * drawn(6, 9), 0.01 * drawn(6, 9, seed=1)
    deltas[0][2, 3] = 1.0
    weights = [weight_of(merged("r_tsvm", scaled, rank_rule="uniform", outlier_sigma=2.0), scaled)
               for scaled in (deltas, [10 * deltas[0], deltas[1]])]  # fmt: skip
    np.testing.assert_allclose(weights[0], weights[1], atol=1e-9)
    assert weights[0][0] > 1 > weights[0][1]
    np.testing.assert_allclose(np.mean(weights[0]), 1.0)


def weight_of(out: Any, deltas: list[Any]) -> list[float]:
    halves = (slice(0, 6), slice(6, 12))
    return [np.linalg.norm(out[half], 2) / np.linalg.norm(each, 2) for half, each in zip(halves, deltas, strict=True)]


def test_r_tsvm_divides_the_rank_by_density() -> None:
    assert shares([0.5, 0.5], 7) == [4, 3]
    assert shares([0.9, 0.1, 0.0], 10) == [9, 1, 0]
    assert shares([1.0, 0.001, 0.001], 3) == [1, 1, 1]
    assert shares([0.0, 0.0], 4) == [0, 0]


def test_r_tsvm_keeps_as_many_triplets_as_the_energy_needs() -> None:
    delta = conditioned((10, 7), 1e3)
    sigma = np.linalg.svd(delta, compute_uv=False)
    wanted = float((sigma[:3] ** 2).sum() / (sigma**2).sum()) - 1e-9
    out = merged("r_tsvm", [delta], weighting="none", rank_rule="energy", energy_share=wanted)
    np.testing.assert_allclose(out, triplets(delta, 3).matrix(), atol=1e-12)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30)])
@pytest.mark.parametrize("kappa", [1e6, 1e8, 1e10])
def test_small_singular_values_are_as_exact_as_those_of_an_svd(shape: tuple[int, int], kappa: float) -> None:
    """Where the Gram matrix alone would have lost them."""
    matrix = conditioned(shape, kappa)
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    found, factor = spectrum_and_polar(matrix)
    np.testing.assert_allclose(found, sigma, rtol=1e-13 * kappa)
    np.testing.assert_allclose(factor, left @ right, atol=1e-13 * kappa)
    all_of_it = triplets(matrix)
    np.testing.assert_allclose(all_of_it.matrix(), matrix, atol=1e-13)
    np.testing.assert_allclose(all_of_it.left.T @ all_of_it.left, np.eye(30), atol=1e-13 * kappa)


@pytest.mark.parametrize("size", [512, 1024])
def test_eigenproblems_of_sizes_that_caches_bear_badly(size: int) -> None:
    factor = drawn(size, 20)
    gram = factor @ factor.T
    values, vectors = descending(gram.copy())
    np.testing.assert_allclose(values[::-1], np.linalg.eigvalsh(gram), atol=1e-11 * size)
    np.testing.assert_allclose((vectors * values) @ vectors.T, gram, atol=1e-11 * size)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(size), atol=1e-12)


def test_the_sum_of_orthogonalised_triplets_is_made_of_polar_factors() -> None:
    for rows, columns in ((20, 30), (30, 20), (24, 24)):
        parts = [triplets(drawn(rows, columns, seed=seed), 6) for seed in range(3)]
        twice = [parts[0], parts[0], parts[1]]
        for chosen in (parts, twice):
            np.testing.assert_allclose(orthogonal_sum(chosen), combined(chosen, orthogonal=True).matrix(), atol=1e-10)


@pytest.mark.parametrize("scale", [1e-140, 1e-30, 1e30, 1e140])
@pytest.mark.parametrize("shape", SHAPES)
def test_scale_changes_nothing_but_the_singular_values(shape: tuple[int, int], scale: float) -> None:
    matrix = conditioned(shape, 1e3)
    (sigma, factor), (scaled, alike) = spectrum_and_polar(matrix), spectrum_and_polar(scale * matrix)
    np.testing.assert_allclose(scaled / scale, sigma, rtol=1e-9)
    np.testing.assert_allclose(alike, factor, atol=1e-9)
    np.testing.assert_allclose(triplets(scale * matrix, 1).matrix() / scale, triplets(matrix, 1).matrix(), atol=1e-13)


ALIKE = {"equal": [1] * 30, "in groups": [1] * 10 + [0.1] * 10 + [1e-5] * 10, "few": [3, 2, 2] + [0] * 27}


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30)])
@pytest.mark.parametrize("values", ALIKE)
def test_equal_and_lacking_singular_values(values: str, shape: tuple[int, int]) -> None:
    """What does not depend on the vectors' choice is as an SVD has it: cuts between groups, and the polar factor."""
    sigma = np.array(ALIKE[values], np.float64)
    left, _, right = np.linalg.svd(drawn(*shape), full_matrices=False)
    matrix = (left * sigma) @ right
    for count in np.flatnonzero(np.diff(sigma, append=0)) + 1:
        cut = triplets(matrix, int(count))
        np.testing.assert_allclose(cut.matrix(), (left * sigma)[:, :count] @ right[:count], atol=1e-12)
        np.testing.assert_allclose(cut.right.T @ cut.right, np.eye(count), atol=1e-10)
        np.testing.assert_allclose(cut.left @ cut.left.T, left[:, :count] @ left[:, :count].T, atol=1e-8)
    found, factor = spectrum_and_polar(matrix)
    np.testing.assert_allclose(found, sigma[sigma > 0], rtol=1e-9)
    np.testing.assert_allclose(factor, left[:, sigma > 0] @ right[sigma > 0], atol=1e-8)


def test_numpy_alone_finds_the_same(monkeypatch: Any) -> None:
    """Where its LAPACK cannot be called by name."""
    matrices = [conditioned(shape, kappa) for shape in (*SHAPES, (30, 20)) for kappa in (1e2, 1e8)]
    here = [(triplets(matrix, 3).matrix(), polar(matrix)) for matrix in matrices]
    monkeypatch.setattr(lapack, "library", lambda: None)
    for matrix, (cut, factor) in zip(matrices, here, strict=True):
        np.testing.assert_allclose(triplets(matrix, 3).matrix(), cut, atol=1e-13)
        np.testing.assert_allclose(polar(matrix), factor, atol=1e-7)


def test_iso_cts_of_tasks_that_live_in_the_common_directions() -> None:
    """What remains of them is rounding, which must not be taken for directions."""
    shared = drawn(10, 5) @ drawn(5, 7)
    out = merged("iso", [shared, 2 * shared, 3 * shared], variant="iso_cts")
    np.testing.assert_allclose(out, merged("iso", [6 * shared]), atol=1e-10)

"""Means and arcs on the sphere, against the published steps in float64, and where there is no direction."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import smelt
from smelt.errors import OperationFailed, UsageError
from smelt.methods.spherical import arc, row_products
from tests.small_models import Arrays
from tests.tensors import BASE, X, Y, Z, assert_close, bits

Array = npt.NDArray[Any]


def merged(method: str, models: Any, base: Any = None, weight: Any = None, **parameters: Any) -> Array:
    """One tensor of each model, merged."""
    given = [{"w": np.asarray(model, np.float32)} for model in models]
    per_model = {} if weight is None else {"weight": weight}
    origin = None if base is None else {"w": np.asarray(base, np.float32)}
    return np.asarray(smelt.merge_tensors(method, given, origin, per_model=per_model, parameters=parameters)["w"])


def drawn(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def length(x: Array) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))


#: A matrix of more elements than one tile, and a few rows of odd length.
LARGE, SMALL = (800, 701), (5, 7)


# --- NuSLERP --------------------------------------------------------------------------------------------


def oracle_nuslerp(a: Array, b: Array, t: float, axis: int) -> Array:
    a, b = np.float64(a), np.float64(b)
    norms = [np.linalg.norm(v, axis=axis, keepdims=True) for v in (a, b)]
    angle = np.arccos((a * b).sum(axis=axis, keepdims=True) / norms[0] / norms[1])
    return np.asarray((np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle))


@pytest.mark.parametrize("shape", [LARGE, SMALL, (4, 3, 5)], ids=str)
@pytest.mark.parametrize(("axis", "number"), [("last", -1), ("first", 0), ("flat", -1)])
@pytest.mark.parametrize("with_base", [False, True])
def test_nuslerp_is_the_formula_along_each_axis(
    shape: tuple[int, ...], axis: str, number: int, with_base: bool
) -> None:
    a, b = drawn(1, *shape), drawn(2, *shape)
    base = drawn(3, *shape) if with_base else np.zeros(shape, np.float32)
    out = merged("nuslerp", [a, b], base if with_base else None, weight=[1, 3], axis=axis)
    x = [(v - base).reshape(-1 if axis == "flat" else shape) for v in (a, b)]
    expected = base + oracle_nuslerp(x[0], x[1], 0.75, number).reshape(shape)
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("shape", [LARGE, (4, 3, 5)], ids=str)
def test_mergekits_switches_name_the_axes(shape: tuple[int, ...]) -> None:
    a, b = drawn(1, *shape), drawn(2, *shape)
    for row_wise, axis in ((True, "first"), (False, "last")):
        theirs = merged("nuslerp", [a, b], weight=[1, 2], variant="mergekit", nuslerp_flatten=False,
                        nuslerp_row_wise=row_wise)  # fmt: skip
        assert np.array_equal(theirs, merged("nuslerp", [a, b], weight=[1, 2], axis=axis))
    theirs = merged("nuslerp", [a, b], weight=[1, 2], variant="mergekit", nuslerp_row_wise=True)
    assert np.array_equal(theirs, merged("nuslerp", [a, b], weight=[1, 2]))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("nuslerp", {"axis": "first"}), ("nuslerp", {"axis": "last"}), ("model_stock", {"filter_wise": True})],
)
def test_rows_and_columns_do_not_depend_on_threads(method: str, parameters: dict[str, Any]) -> None:
    a, b, base = ({"w": drawn(seed, *LARGE)} for seed in range(3))
    each = {"weight": [1, 2]} if method == "nuslerp" else {}
    runs = [
        smelt.merge_tensors(method, [a, b], base, parameters=parameters, per_model=each, threads=threads)
        for threads in (1, 3)
    ]
    assert bits(runs[0]) == bits(runs[1])


@pytest.mark.parametrize("size", [1, 7, 8, 9, 127, 129, 1000, 5001])
def test_products_of_a_row_do_not_depend_on_its_neighbours(size: int) -> None:
    a, b = drawn(1, 9, size), drawn(2, 9, size)
    whole = row_products((a, b))
    for first, last in ((0, 1), (2, 9), (8, 9)):
        assert np.array_equal(row_products((a[first:last], b[first:last])), whole[first:last])


@pytest.mark.parametrize("angle", [3.0, 1.0, 1e-2, 1e-4, 1e-6, 1e-8, 0.0])
@pytest.mark.parametrize("t", [0.25, 0.5, 1.5])
def test_factors_of_an_arc_are_exact_for_any_angle(angle: float, t: float) -> None:
    """In extended precision, by the series where the angle is small."""
    wide, share = np.longdouble(angle), np.longdouble(t)
    if angle > 1e-3:
        wanted = [np.sin((1 - share) * wide) / np.sin(wide), np.sin(share * wide) / np.sin(wide)]
    else:
        wanted = [s * (1 + (1 - s * s) * wide * wide / 6) for s in (1 - share, share)]
    np.testing.assert_allclose(np.float64(arc(np.cos(angle), t)), np.float64(wanted), rtol=0, atol=2e-14)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), angle=st.sampled_from([1e-3, 1e-2, 0.1, 1.5, 3.1]), t=st.floats(0, 1))
def test_nuslerp_keeps_the_norm_that_both_models_have(seed: int, angle: float, t: float) -> None:
    a, other = np.linalg.qr(np.float64(drawn(seed, 50, 2)))[0].T
    out = merged("nuslerp", [a, np.cos(angle) * a + np.sin(angle) * other], weight=[1 - t, t])
    assert abs(length(out) - 1) < (1e-5 if angle > 3 else 1e-6)


@pytest.mark.parametrize(("a", "b"), [([3, 4], [6, 8]), ([1, 2], [-1, -2]), ([1, 2], [-3, -6]), ([0, 0], [0, 0])])
@pytest.mark.parametrize("variant", ["paper", "mergekit"])
def test_nuslerp_is_straight_where_there_is_no_arc(a: list[float], b: list[float], variant: str) -> None:
    out = merged("nuslerp", [a, b], weight=[3, 1], variant=variant)
    np.testing.assert_allclose(out, 0.75 * np.array(a) + 0.25 * np.array(b), rtol=1e-6)


def test_a_zero_vector_is_no_direction_but_a_right_angle_to_mergekit() -> None:
    np.testing.assert_allclose(merged("nuslerp", [[0, 0], [1, 2]], weight=[1, 1]), [0.5, 1.0])
    theirs = merged("nuslerp", [[0, 0], [1, 2]], weight=[1, 1], variant="mergekit")
    np.testing.assert_allclose(theirs, np.sqrt([0.5, 2.0]), rtol=1e-6)


def test_weights_that_cancel_mean_half_way() -> None:
    np.testing.assert_allclose(merged("nuslerp", [[1, 0], [0, 1]], weight=[1, -1]), [np.sqrt(0.5)] * 2, rtol=1e-6)


# --- Multi-SLERP ----------------------------------------------------------------------------------------


def oracle_multislerp(models: list[Array], weights: Array) -> Array:
    """All published steps, the exponential map included."""
    x = np.float64(models)
    norms = np.linalg.norm(x, axis=1)
    units = x / norms[:, None]
    mean = weights @ units / np.linalg.norm(weights @ units)
    tangent = weights @ (units - (units @ mean)[:, None] * mean)
    size = np.linalg.norm(tangent) + 1e-8
    return np.asarray((mean * np.cos(size) + tangent * np.sin(size) / size) * (weights @ norms))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("with_base", [True, False])
def test_multislerp_is_what_the_published_steps_give(normalize: bool, with_base: bool) -> None:
    models, weights = [drawn(seed, 60) for seed in range(4)], np.array([0.5, 1.0, 0.25, 0.5])
    base = drawn(9, 60) if with_base else np.zeros(60, np.float32)
    out = merged("multislerp", models, base if with_base else None, weights.tolist(), normalize_weights=normalize)
    chosen = weights / weights.sum() if normalize else weights
    expected = base + oracle_multislerp([model - base for model in models], chosen)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_multislerp_where_directions_cancel_out() -> None:
    a, b = [1.0, 2.0], [-3.0, -6.0]
    np.testing.assert_allclose(merged("multislerp", [a, b], weight=[1, 1]), [-1, -2])
    with pytest.raises(OperationFailed, match="tensor 'w': the weighted directions of the models cancel out"):
        merged("multislerp", [a, b, [0, 0]], weight=[1, 1, 1])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_zero_task_vectors_give_the_base(count: int) -> None:
    assert bits(smelt.merge_tensors("multislerp", [BASE] * count, BASE, parameters={"weight": 1.0})) == bits(
        dict(sorted(BASE.items()))
    )


# --- Karcher mean ---------------------------------------------------------------------------------------


def oracle_karcher(models: list[Array], max_iter: int, tol: float) -> Array:
    """The iteration on the vectors themselves."""
    x = np.float64(models)
    norms = np.linalg.norm(x, axis=1)
    units = x / norms[:, None]
    u = units.mean(axis=0) / np.linalg.norm(units.mean(axis=0))
    for _ in range(max_iter):
        cosine = units @ u
        angle = np.arccos(cosine)
        tangent = np.mean((angle / np.sin(angle))[:, None] * (units - cosine[:, None] * u), axis=0)
        step = np.linalg.norm(tangent)
        if step < tol:
            break
        u = np.cos(step) * u + np.sin(step) * tangent / step
    return np.asarray(norms.mean() * u)


@pytest.mark.parametrize("max_iter", [0, 1, 30])
@pytest.mark.parametrize("spread", [3.0, 0.5, 1e-2])
def test_karcher_is_the_iteration_on_the_vectors(max_iter: int, spread: float) -> None:
    centre = drawn(0, 40)
    models = [centre + np.float32(spread * size) * drawn(size, 40) for size in (1, 2, 3)]
    out = merged("karcher", models, max_iter=max_iter, tol=1e-7)
    np.testing.assert_allclose(out, oracle_karcher(models, max_iter, 1e-7), rtol=1e-5, atol=1e-6)


def test_the_karcher_mean_of_two_is_half_way_on_the_arc() -> None:
    a, b = (v / length(v) for v in (drawn(1, 30), drawn(2, 30)))
    np.testing.assert_allclose(merged("karcher", [a, b]), merged("nuslerp", [a, b], weight=[1, 1]), atol=1e-6)


def test_a_weight_of_two_is_a_model_given_twice() -> None:
    models = [drawn(seed, 30) for seed in range(3)]
    twice = merged("karcher", [models[0], *models])
    np.testing.assert_allclose(merged("karcher", models, weight=[2, 1, 1]), twice, rtol=1e-5, atol=1e-6)


def test_the_order_of_models_does_not_matter_on_the_sphere() -> None:
    for method, base, parameters in (
        ("karcher", None, {}),
        ("model_stock", BASE, {}),
        ("multislerp", BASE, {"weight": 1.0}),
    ):
        first, second = (smelt.merge_tensors(method, m, base, parameters=parameters) for m in ([X, Y, Z], [Z, X, Y]))
        assert_close(first, second, ulps=8)


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ([[1, 2], [-1, -2]], [0, 0]),
        ([[1, 2], [-3, -6]], [-1, -2]),
        ([[0, 0], [0, 0]], [0, 0]),
        ([[1e-6, 0], [3e-6, 0]], [2e-6, 0]),
        ([[0, 0], [3, 4]], [1.5, 2]),
        ([[3, 4], [3, 4]], [3, 4]),
    ],
    ids=["opposite", "opposite, unequal", "zeros", "below tol", "one zero", "equal"],
)
def test_karcher_where_there_is_no_mean_direction(models: Any, expected: Any) -> None:
    np.testing.assert_allclose(merged("karcher", models), expected, rtol=1e-6, atol=1e-12)


# --- Model Stock ----------------------------------------------------------------------------------------


def at_angle(cosine: float, count: int) -> Array:
    """Unit vectors with the same cosine between all pairs."""
    gram = np.full((count, count), cosine) + (1 - cosine) * np.eye(count)
    return np.asarray(np.linalg.cholesky(gram).astype(np.float32))


@pytest.mark.parametrize("variant", ["paper", "mergekit"])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("cosine", [0.9, 0.5, 0.0, -0.2])
def test_model_stock_goes_as_far_as_the_angle_says(variant: str, count: int, cosine: float) -> None:
    taus, base = at_angle(cosine, count), drawn(1, count)
    t = count * cosine / (1 + (count - 1) * cosine)
    out = merged("model_stock", base + taus, base, variant=variant)
    np.testing.assert_allclose(out, base + t * taus.mean(axis=0), atol=2e-6)


def test_model_stock_row_by_row_is_each_row_alone() -> None:
    base, a, b, c = (drawn(seed, *SMALL) for seed in range(4))
    out = merged("model_stock", [a, b, c], base, filter_wise=True)
    alone = [merged("model_stock", rows[1:], rows[0]) for rows in zip(base, a, b, c, strict=True)]
    np.testing.assert_allclose(out, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("filter_wise", [True, False])
def test_duplicates_give_the_model_and_zero_task_vectors_the_base(filter_wise: bool) -> None:
    parameters = {"filter_wise": filter_wise}
    assert_close(smelt.merge_tensors("model_stock", [X, X, X], BASE, parameters=parameters), X)
    frozen = smelt.merge_tensors("model_stock", [BASE, X], BASE, parameters=parameters)
    assert bits(frozen) == bits(dict(sorted(BASE.items())))


@pytest.mark.parametrize("filter_wise", [True, False])
def test_small_task_vectors_collapse_in_mergekits_flavour_only(filter_wise: bool) -> None:
    tau = np.float32(1e-4) * drawn(1, 2, 8)
    models, base = [tau, tau], np.zeros((2, 8))
    np.testing.assert_allclose(merged("model_stock", models, base, filter_wise=filter_wise), tau, rtol=1e-6)
    theirs = merged("model_stock", models, base, filter_wise=filter_wise, variant="mergekit")
    assert length(theirs) < 0.6 * length(tau)
    same = merged("model_stock", models, base, filter_wise=filter_wise, floor=1e-6)
    assert np.array_equal(theirs, same)


def test_an_obtuse_angle_leads_away_unless_clamped() -> None:
    models, base = at_angle(-0.5, 2), np.zeros(2)
    np.testing.assert_allclose(merged("model_stock", models, base), -2 * models.mean(axis=0), rtol=1e-6)
    assert np.array_equal(merged("model_stock", models, base, clamp=True), base)
    assert np.array_equal(merged("model_stock", [[1, 0], [-1, 0]], base), base)


# --- what is refused, and what passes -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "models", "parameters", "message"),
    [
        ("nuslerp", [X, Y, Z], {"weight": 1.0}, r"nuslerp takes 2 model\(s\) beside the base, 3 were given"),
        ("nuslerp", [X, Y], {"weight": 1.0, "nuslerp_flatten": False}, "nuslerp_flatten has no effect"),
        ("nuslerp", [X, Y], {"weight": 1.0, "variant": "mergekit", "axis": "last"}, "axis has no effect"),
        ("nuslerp", [X, Y], {}, "weight is required"),
        ("model_stock", [X], {}, r"model_stock takes at least 2 model\(s\)"),
        ("multislerp", [X, Y], {"weight": 0.0}, "sum to zero: set normalize_weights: false"),
        ("karcher", [X, Y], {"weight": 0.0}, "the weights of .* are all zero"),
        ("karcher", [X, Y], {"weight": -1.0}, r"weight must lie in \[0, inf\)"),
        ("karcher", [X, Y], {"tol": 0.0}, r"tol must lie in \(0, inf\)"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(method: str, models: list[Arrays], parameters: Any, message: str) -> None:
    base = BASE if method == "model_stock" else None
    with pytest.raises(UsageError, match=message):
        smelt.merge_tensors(method, models, base, parameters=parameters)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [("nuslerp", {"weight": 1.0, "axis": axis}) for axis in ("flat", "last", "first")]
    + [("model_stock", {"filter_wise": rows}) for rows in (True, False)]
    + [("multislerp", {"weight": 1.0}), ("karcher", {})],
)
def test_a_value_that_is_no_number_is_named_or_stays_where_it_is(value: float, method: str, parameters: Any) -> None:
    bad = {"w": drawn(1, *SMALL)}
    bad["w"][2, 3] = value
    base = None if method == "karcher" else {"w": drawn(0, *SMALL)}
    models = [bad, {"w": drawn(2, *SMALL)}]
    with pytest.raises(OperationFailed, match=r"model 0: tensor 'w' holds 1 NaN or Inf, the first at element 17"):
        smelt.merge_tensors(method, models, base, parameters=parameters)
    out = smelt.merge_tensors(method, models, base, parameters=parameters, on_nonfinite="allow")["w"]
    assert np.flatnonzero(~np.isfinite(out)).tolist() in ([17], [])

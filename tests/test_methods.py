"""Laws of merging: what each method promises, and what goes in and out of ``merge_tensors``."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import smelt
from smelt.errors import InputRejected, OperationFailed, UsageError
from tests.small_models import Arrays
from tests.tensors import BASE, X, Y, Z, assert_close, bits, model

merge_tensors = smelt.merge_tensors


# --- identity, permutation, shift -----------------------------------------------------------------------


@pytest.mark.parametrize("copies", [1, 2])
def test_linear_of_copies_is_the_model_itself(copies: int) -> None:
    assert bits(merge_tensors("linear", [X] * copies)) == bits(dict(sorted(X.items())))


def test_linear_of_three_copies_is_the_model_but_for_rounding() -> None:
    assert_close(merge_tensors("linear", [X] * 3), X, ulps=1)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_one_whole_task_vector_gives_the_model_back(method: str) -> None:
    parameters = {"density": 1.0} if method == "ties" else {}
    assert_close(merge_tensors(method, [X], BASE, parameters=parameters), X, ulps=1)


SYMMETRIC = {"linear": {}, "task_arithmetic": {}, "ties": {"density": 0.5, "variant": "mergekit", "weight": 1.0}}


@pytest.mark.parametrize("method", SYMMETRIC)
def test_models_may_come_in_any_order(method: str) -> None:
    base = None if method == "linear" else BASE
    results = [merge_tensors(method, order, base, parameters=SYMMETRIC[method]) for order in permutations([X, Y, Z])]
    for result in results[1:]:
        assert_close(result, results[0])
    one, other = (merge_tensors(method, pair, base, parameters=SYMMETRIC[method]) for pair in ([X, Y], [Y, X]))
    assert bits(one) == bits(other)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_shift_of_everything_shifts_the_result(method: str) -> None:
    """On a grid on which sums and differences are exact, so that trimming and votes cannot flip."""
    base, x, y = ({name: np.round(a * 64) / 64 for name, a in arrays.items()} for arrays in (BASE, X, Y))
    shifted = [{name: a + np.float32(2) for name, a in arrays.items()} for arrays in (base, x, y)]
    here = merge_tensors(method, [x, y], base)
    there = merge_tensors(method, shifted[1:], shifted[0])
    assert_close({name: a - np.float32(2) for name, a in there.items()}, here)


@settings(max_examples=25)
@given(weights=st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=2))
def test_task_arithmetic_is_linear_in_its_weights(weights: list[float]) -> None:
    """Against numpy's float32 in the same order: not a bit differs."""
    out = merge_tensors("task_arithmetic", [X, Y], BASE, per_model={"weight": weights})
    a, b = (np.float32(weight) for weight in weights)
    for name, base in BASE.items():
        wanted = base + (a * (X[name] - base) + b * (Y[name] - base))
        np.testing.assert_array_equal(out[name], wanted)


# --- limits ---------------------------------------------------------------------------------------------


def test_density_one_trims_nothing() -> None:
    trimmed = merge_tensors("ties", [X, Y], BASE, parameters={"density": 1.0})
    assert bits(trimmed) == bits(merge_tensors("ties", [X, Y], BASE, parameters={"trim": "none"}))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_ties_keeps_the_stated_share_of_the_whole_model(density: float) -> None:
    """One model, lambda 1: what is not trimmed is the model's, the rest the base's; int(d k) + 1 without ties."""
    out = merge_tensors("ties", [X], BASE, parameters={"density": density})
    kept = sum(int((out[name] != BASE[name]).sum()) for name in BASE)
    total = sum(array.size for array in BASE.values())
    assert kept == int(total * density) + 1


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_mergekits_ties_keeps_the_stated_share_of_each_tensor(density: float) -> None:
    parameters = {"density": density, "variant": "mergekit", "weight": 1.0}
    out = merge_tensors("ties", [X], BASE, parameters=parameters)
    for name, base in BASE.items():
        assert (out[name] != base).sum() == (max(1, int(base.size * density)) if base.size else 0)


def test_dare_that_drops_nothing_is_task_arithmetic() -> None:
    plain = merge_tensors("task_arithmetic", [X, Y], BASE, parameters={"weight": 0.4})
    assert bits(merge_tensors("dare_linear", [X, Y], BASE, parameters={"weight": 0.4, "density": 1.0})) == bits(plain)
    all_in = {"drop_rate": 0.0, "merge": "task_arithmetic", "lambda": 0.4}
    assert_close(merge_tensors("dare", [X, Y], BASE, parameters=all_in), plain)


@pytest.mark.parametrize("keep", [0.5, 0.1])
def test_dare_is_task_arithmetic_on_average(keep: float) -> None:
    """The mean over many seeds lies within five standard errors, element by element."""
    seeds, size = 250, 2000
    base = {"w": np.zeros(size, np.float32)}
    tuned = {"w": np.random.default_rng(0).standard_normal(size).astype(np.float32)}
    parameters = {"drop_rate": 1 - keep, "merge": "task_arithmetic"}
    total = np.zeros(size)
    for seed in range(seeds):
        total += merge_tensors("dare", [tuned], base, parameters=parameters, seed=seed)["w"]
    deviation = np.abs(tuned["w"]) * np.sqrt((1 - keep) / keep)
    assert (np.abs(total / seeds - tuned["w"]) <= 5 * deviation / np.sqrt(seeds)).all()


def test_draws_of_models_and_tensors_are_independent() -> None:
    base = {name: np.zeros(4000, np.float32) for name in ("a", "b")}
    ones = {name: np.ones(4000, np.float32) for name in ("a", "b")}
    parameters = {"drop_rate": 0.5, "merge": "none"}
    out = merge_tensors("dare", [ones], base, parameters=parameters)
    both = merge_tensors("dare", [ones, ones], base, parameters={**parameters, "merge": "task_arithmetic"})
    second = both["a"] - out["a"]
    assert set(np.unique(out["a"])) == {0.0, 2.0}
    for other in (out["b"], second):
        assert abs(np.corrcoef(out["a"], other)[0, 1]) < 5 / np.sqrt(4000)


# --- slerp ----------------------------------------------------------------------------------------------


def slerp(t: float, a: Any, b: Any, **more: float) -> Any:
    parameters = {"t": t, **more}
    return merge_tensors("slerp", [{"w": np.asarray(b, np.float32)}], {"w": np.asarray(a, np.float32)},
                         parameters=parameters)["w"]  # fmt: skip


@pytest.mark.parametrize("threshold", [0.9995, 0.5])
def test_slerp_ends_at_its_ends(threshold: float) -> None:
    for t, end in ((0.0, BASE), (1.0, X)):
        out = merge_tensors("slerp", [X], BASE, parameters={"t": t, "dot_threshold": threshold})
        assert bits(out) == bits(dict(sorted(end.items())))


def test_slerp_runs_along_the_circle() -> None:
    third = slerp(1 / 3, [1, 0], [0, 1])
    np.testing.assert_allclose(third, [np.cos(np.pi / 6), np.sin(np.pi / 6)], atol=1e-7)


def oracle_slerp(t: float, a: Any, b: Any) -> Any:
    a, b = np.float64(a), np.float64(b)
    angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@settings(max_examples=30)
@given(t=st.floats(0, 1), seed=st.integers(0, 1000))
def test_slerp_is_the_formula_and_the_same_from_both_ends(t: float, seed: int) -> None:
    a, b = np.random.default_rng(seed).standard_normal((2, 30)).astype(np.float32)
    np.testing.assert_allclose(slerp(t, a, b), oracle_slerp(t, a, b), atol=2e-6)
    np.testing.assert_allclose(slerp(t, a, b), slerp(1 - t, b, a), atol=2e-6)


@pytest.mark.parametrize(("a", "b"), [([3, 4], [6, 8]), ([0, 0], [1, 2]), ([1, 2], [0, 0]), ([1, 2], [-1, -2])])
@pytest.mark.parametrize("threshold", [0.9995, 1.0])
def test_slerp_is_straight_where_there_is_no_arc(a: list[float], b: list[float], threshold: float) -> None:
    """Parallel, opposite and zero vectors."""
    np.testing.assert_allclose(slerp(0.25, a, b, dot_threshold=threshold), 0.75 * np.array(a) + 0.25 * np.array(b))


# --- arrays in, arrays out ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_numpy_in_numpy_out(dtype: Any) -> None:
    out = merge_tensors("linear", [model(1, dtype), model(2, dtype)])
    assert all(isinstance(array, np.ndarray) and array.dtype == dtype for array in out.values())
    wanted = {n: (a.astype(np.float64) + model(2, dtype)[n].astype(np.float64)) / 2 for n, a in model(1, dtype).items()}
    step = {2: 2.0**-7, 4: 2.0**-22, 8: 2.0**-50}[np.dtype(dtype).itemsize]
    assert all(np.allclose(out[n].astype(np.float64), wanted[n], rtol=step, atol=step) for n in out)


def test_the_type_of_the_output_can_be_chosen() -> None:
    out = merge_tensors("linear", [X, Y], dtype="bfloat16")
    whole = merge_tensors("linear", [X, Y])
    assert bits(out) == bits({name: array.astype(ml_dtypes.bfloat16) for name, array in whole.items()})


def test_torch_in_torch_out() -> None:
    torch = pytest.importorskip("torch")
    models = [
        {name: torch.tensor(array, dtype=torch.bfloat16) for name, array in arrays.items()} for arrays in (X, Y, BASE)
    ]
    out = merge_tensors("task_arithmetic", models[:2], models[2])
    plain = merge_tensors("task_arithmetic", [model(1, ml_dtypes.bfloat16), model(2, ml_dtypes.bfloat16)],
                          model(0, ml_dtypes.bfloat16))  # fmt: skip
    for name, tensor in out.items():
        assert isinstance(tensor, torch.Tensor)
        assert (tensor.dtype, tuple(tensor.shape)) == (torch.bfloat16, X[name].shape)
        assert tensor.view(torch.int16).numpy().tobytes() == plain[name].tobytes()


def test_torch_parameters_and_views_are_taken_as_they_are() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
    out = merge_tensors("linear", [{"w": weight, "t": weight.T}, {"w": weight, "t": weight.T}])
    assert not out["w"].requires_grad
    assert torch.equal(out["w"], weight.detach())
    assert torch.equal(out["t"], weight.detach().T)


def test_integers_travel_from_the_base() -> None:
    steps = np.arange(3)
    out = merge_tensors("task_arithmetic", [{**X, "steps": steps}], {**BASE, "steps": steps})
    np.testing.assert_array_equal(out["steps"], steps)


def test_tied_names_are_merged_once() -> None:
    models = [{"embed": a["matrix"], "head": a["matrix"]} for a in (X, Y, BASE)]
    out = merge_tensors("ties", models[:2], models[2], tied={"head": "embed"})
    alone = merge_tensors("ties", *([{"embed": m["embed"]} for m in models[:2]], {"embed": models[2]["embed"]}))
    assert bits(out) == bits({"embed": alone["embed"], "head": alone["embed"]})


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_masks_take_the_place_of_draws(device: str) -> None:
    if device != "cpu":
        pytest.importorskip("torch")
    mask = {name: np.arange(a.size).reshape(a.shape) % 2 == 0 for name, a in BASE.items()}
    parameters = {"drop_rate": 0.5, "merge": "none"}
    out = merge_tensors("dare", [X], BASE, parameters=parameters, masks=[mask], device=device)
    for name, base in BASE.items():
        wanted = np.where(mask[name], base + np.float32(2) * (X[name] - base), base)
        np.testing.assert_array_equal(out[name], wanted)


def test_a_large_tensor_with_a_nan_is_ranked_all_the_same() -> None:
    """More elements than the sample that a rank search starts from."""
    base = {"w": np.zeros(200_000, np.float32)}
    tuned = {"w": np.random.default_rng(0).standard_normal(200_000).astype(np.float32)}
    tuned["w"][70_000] = np.nan
    for variant in ("paper", "mergekit"):
        parameters = {"density": 0.3, "variant": variant, "weight": 1.0}
        with pytest.raises(OperationFailed, match=r"model 0: tensor 'w' holds 1 NaN or Inf.* element 70000"):
            merge_tensors("ties", [tuned], base, parameters=parameters)
        out = merge_tensors("ties", [tuned], base, parameters=parameters, on_nonfinite="allow")
        assert 59_000 < (out["w"] != 0).sum() <= 60_001


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("ties", {"density": 1.5}, r"density must lie in \[0, 1\], not 1.5"),
        ("ties", {"density": -0.1}, r"density must lie in \[0, 1\]"),
        ("ties", {"density": float("nan")}, "density must"),
        ("ties", {"weight": float("inf")}, "weight must be finite"),
        ("ties", {"lambda": "much"}, "lambda must be a float, not 'much'"),
        ("ties", {"lambda": True}, "lambda must be a float, not True"),
        ("ties", {"normalize": 1}, "normalize must be a bool, not 1"),
        ("ties", {"scope": "layer"}, "scope must be one of model, tensor, not 'layer'"),
        ("ties", {"variant": "mine"}, "variant must be one of paper, mergekit, not 'mine'"),
        ("ties", {"densty": 0.5}, r"no parameter 'densty'; did you mean 'density'\?"),
        ("slerp", {}, "t is required"),
        ("dare", {}, "drop_rate is required for each model"),
        ("dare", {"drop_rate": 1.5}, r"drop_rate must lie in \[0, 1\]"),
        ("dare", {"drop_rate": 0.5, "top_k": 0.1}, "top_k has no effect with merge: average"),
        ("linear", {"weight": 0.0}, "sum to zero"),
        ("tie", {}, r"unknown merge method 'tie'; did you mean 'ties'\?"),
    ],
)
def test_wrong_parameters_are_usage_errors(method: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merge_tensors(method, [X] if method == "slerp" else [X, Y], BASE, parameters=parameters)


def test_all_wrong_parameters_are_told_at_once() -> None:
    with pytest.raises(UsageError) as told:
        merge_tensors(
            "ties", [X, Y], BASE,
            parameters={"lamda": 1, "trim": "most"}, per_model={"density": [2.0, 0.5], "weight": [1]},
        )  # fmt: skip
    assert len(told.value.problems) == 4
    assert all(word in str(told.value) for word in ("lamda", "trim", "density", "weight: 1 values for 2 models"))


@pytest.mark.parametrize(
    ("method", "models", "base", "message"),
    [
        ("ties", [X], None, "ties needs a base model"),
        ("slerp", [X, Y], BASE, r"slerp takes 1 model\(s\) beside the base, 2 were given"),
        ("passthrough", [X, Y], None, r"passthrough takes 1 model"),
        ("linear", [], None, "linear takes at least 1"),
    ],
)
def test_wrong_numbers_of_models(method: str, models: list[Arrays], base: Arrays | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merge_tensors(method, models, base, parameters={"t": 0.5} if method == "slerp" else {})


def test_tensors_that_do_not_fit_are_told_at_once() -> None:
    odd = {name: array for name, array in Y.items() if name != "row"} | {"matrix": np.ones((2, 2), np.float32)}
    with pytest.raises(InputRejected) as told:
        merge_tensors("linear", [X, odd])
    assert len(told.value.problems) == 2
    assert "'row' is missing in model 1" in str(told.value)
    assert "'matrix': shapes differ" in str(told.value)

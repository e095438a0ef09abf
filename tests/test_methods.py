"""Laws of merging: what every method of the registry keeps, and what each of them promises."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import smelt
from smelt.errors import InputRejected, OperationFailed, UsageError
from smelt.methods import REQUIRED, Method
from tests.readback import values
from tests.recipes import Family, recipe
from tests.small_models import Arrays

merge_tensors = smelt.merge_tensors
SHAPES: dict[str, tuple[int, ...]] = {"scalar": (), "empty": (0,), "one": (1,), "row": (7,), "matrix": (65, 33)}


def model(seed: int, dtype: Any = np.float32, scale: float = 0.1) -> Arrays:
    """Model 0 is the base, any other a fine-tune of it."""
    drawn = {name: np.random.default_rng(len(name)).standard_normal(shape) for name, shape in SHAPES.items()}
    noise = np.random.default_rng(1000 + seed)
    return {
        name: np.asarray(array + (scale * noise.standard_normal(array.shape) if seed else 0)).astype(dtype)
        for name, array in drawn.items()
    }


BASE, X, Y, Z = (model(seed) for seed in range(4))


def bits(arrays: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(a.dtype), tuple(a.shape), a.tobytes()) for name, a in arrays.items()}


def assert_close(first: Arrays, second: Arrays, ulps: float = 4) -> None:
    """Equal but for a few roundings of numbers of size about one."""
    assert first.keys() == second.keys()
    for name, a in first.items():
        np.testing.assert_allclose(a, second[name], rtol=0, atol=ulps * 2.0**-22, err_msg=name)


# --- what every method keeps: a new method is tested by being in the registry ---------------------------

EVERY = [
    pytest.param(smelt.methods.get(name), variant, id=f"{name}-{variant}")
    for name in smelt.methods.names()
    for variant in smelt.methods.get(name).variants
]


def required(method: Method, variant: str) -> dict[str, Any]:
    """A value for every parameter that has no default, and the variant where there is a choice."""
    chosen: dict[str, Any] = {"variant": variant} if len(method.variants) > 1 else {}
    for parameter in method.parameters:
        if parameter.default_for(variant) is REQUIRED:
            chosen[parameter.name] = {"float": 0.5, "int": 1, "bool": True}[parameter.kind]
    return chosen


def run(method: Method, variant: str, models: Sequence[Arrays], base: Arrays | None = None, **options: Any) -> Any:
    """Merge with the least that the method needs; the base only goes to methods that look at it."""
    known = (BASE if base is None else base) if method.base == "required" else None
    return merge_tensors(method.name, models, known, parameters=required(method, variant), **options)


def as_many(method: Method, models: Sequence[Arrays]) -> Sequence[Arrays]:
    return models[: method.max_models or len(models)]


@pytest.mark.parametrize(("method", "variant"), EVERY)
class TestEveryMethod:
    def test_keeps_names_shapes_and_types(self, method: Method, variant: str) -> None:
        out = run(method, variant, as_many(method, [X, Y]))
        assert {name: (a.dtype, a.shape) for name, a in out.items()} == {n: (a.dtype, a.shape) for n, a in X.items()}
        assert all(np.isfinite(array).all() for array in out.values())

    def test_is_deterministic(self, method: Method, variant: str) -> None:
        runs = [run(method, variant, as_many(method, [X, Y]), threads=threads) for threads in (1, 1, 3)]
        assert bits(runs[0]) == bits(runs[1]) == bits(runs[2])

    def test_does_not_mind_the_order_of_names(self, method: Method, variant: str) -> None:
        turned = [dict(reversed(arrays.items())) for arrays in (X, Y, BASE)]
        first = run(method, variant, as_many(method, [X, Y]))
        second = run(method, variant, as_many(method, turned[:2]), turned[2])
        assert bits(first) == bits(second)
        assert list(first) == sorted(first)

    def test_leaves_its_inputs_alone(self, method: Method, variant: str) -> None:
        before = [bits(arrays) for arrays in (BASE, X, Y)]
        run(method, variant, as_many(method, [X, Y]))
        assert [bits(arrays) for arrays in (BASE, X, Y)] == before

    def test_takes_one_model(self, method: Method, variant: str) -> None:
        out = run(method, variant, [X])
        assert out.keys() == X.keys()
        assert all(np.isfinite(array).all() for array in out.values())

    def test_takes_the_same_model_twice(self, method: Method, variant: str) -> None:
        out = run(method, variant, as_many(method, [X, X]))
        assert all(np.isfinite(array).all() for array in out.values())

    def test_gives_the_base_when_nothing_was_learnt(self, method: Method, variant: str) -> None:
        assert_close(run(method, variant, as_many(method, [BASE, BASE])), BASE)

    def test_layout_in_memory_does_not_matter(self, method: Method, variant: str) -> None:
        turned = [{n: np.asfortranarray(a) if a.ndim == 2 else a for n, a in arrays.items()} for arrays in (X, Y, BASE)]
        first = run(method, variant, as_many(method, [X, Y]))
        assert bits(run(method, variant, as_many(method, turned[:2]), turned[2])) == bits(first)

    def test_names_a_nan(self, method: Method, variant: str) -> None:
        bad = spoilt(X, np.nan)
        with pytest.raises(OperationFailed, match=r"model 0: tensor 'matrix' holds 1 NaN or Inf.* element 5"):
            run(method, variant, as_many(method, [bad, Y]))

    def test_lets_a_nan_pass_where_that_is_wanted(self, method: Method, variant: str) -> None:
        models = as_many(method, [spoilt(X, np.nan), Y])
        with pytest.warns(RuntimeWarning, match="model 0: tensor 'matrix'"):
            warned = run(method, variant, models, on_nonfinite="warn")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            silent = run(method, variant, models, on_nonfinite="allow")
        assert bits(warned) == bits(silent)
        assert np.isnan(silent["matrix"]).sum() <= 1
        assert all(np.isfinite(array).all() for name, array in silent.items() if name != "matrix")

    def test_gives_the_same_bits_through_torch(self, method: Method, variant: str) -> None:
        """The path of the GPU, on the one torch device that every machine has."""
        pytest.importorskip("torch")
        models = as_many(method, [X, Y])
        assert bits(run(method, variant, models, device="cpu:0")) == bits(run(method, variant, models))

    def test_refuses_what_it_does_not_know(self, method: Method, variant: str) -> None:
        with pytest.raises(UsageError, match=f"{method.name} has no parameter 'wieght'"):
            merge_tensors(method.name, as_many(method, [X, Y]), BASE, parameters={"wieght": 1})

    def test_merges_files_as_it_merges_arrays(
        self, method: Method, variant: str, family: Family, tmp_path: Path
    ) -> None:
        chosen = required(method, variant)
        each = {p.name: chosen[p.name] for p in method.parameters if p.per_model and p.name in chosen}
        shared = {name: value for name, value in chosen.items() if name not in each}
        count, needs_base = method.max_models or 2, method.base == "required"
        base = family.base if needs_base else None
        tree = recipe(method.name, family.models[:count], base, each=each, parameters=shared)
        smelt.merge(tree, tmp_path / "out", seed=7)
        weight = {"weight": [1.0] * count} if method.parameter("weight") else {}
        weight |= {name: [value] * count for name, value in each.items()}
        arrays = merge_tensors(
            method.name, family.model_arrays[:count], family.base_arrays if needs_base else None,
            parameters=shared, per_model=weight, seed=7,
        )  # fmt: skip
        assert bits(values(tmp_path / "out")) == bits(arrays)


def spoilt(arrays: Arrays, value: float) -> Arrays:
    bad = {name: array.copy() for name, array in arrays.items()}
    bad["matrix"].reshape(-1)[5] = value
    return bad


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

WITH_LAMBDA = [n for n in smelt.methods.names() if (p := smelt.methods.get(n).parameter("lambda")) and p.when is None]


@pytest.mark.parametrize("name", WITH_LAMBDA)
def test_lambda_zero_is_the_base_bit_for_bit(name: str) -> None:
    parameters = {**required(smelt.methods.get(name), "paper"), "lambda": 0.0}
    out = merge_tensors(name, [X, Y], BASE, parameters=parameters)
    assert bits(out) == bits(dict(sorted(BASE.items())))


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


def test_masks_take_the_place_of_draws() -> None:
    mask = {name: np.arange(a.size).reshape(a.shape) % 2 == 0 for name, a in BASE.items()}
    out = merge_tensors("dare", [X], BASE, parameters={"drop_rate": 0.5, "merge": "none"}, masks=[mask])
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

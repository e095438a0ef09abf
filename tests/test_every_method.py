"""What every method of the registry keeps: a new method is tested by being there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import smelt
from smelt.engine.memory import _survey
from smelt.engine.reduce import reducers_for
from smelt.errors import OperationFailed, UsageError
from smelt.kernels.program import Rank, Top
from smelt.methods import REQUIRED, Method
from tests.given import save_statistics, statistics_for
from tests.readback import values
from tests.recipes import Family, recipe
from tests.small_models import Arrays
from tests.tensors import BASE, X, Y, assert_close, bits, model

EVERY = [
    pytest.param(smelt.methods.get(name), variant, id=f"{name}-{variant}")
    for name in smelt.methods.names()
    for variant in smelt.methods.get(name).variants
    if not smelt.methods.get(name).needs_layers  # the models here have none: see test_lines
]


def required(method: Method, variant: str) -> dict[str, Any]:
    """A value for every parameter that has no default, the variant where there is a choice, and a true share."""
    chosen: dict[str, Any] = {"variant": variant} if len(method.variants) > 1 else {}
    chosen |= {"density": 0.5} if method.parameter("density") else {}
    for parameter in method.parameters:
        if parameter.default_for(variant) is REQUIRED:
            chosen[parameter.name] = {"float": 0.5, "int": 1, "bool": True}[parameter.kind]
    return chosen


def run(method: Method, variant: str, models: Sequence[Arrays], base: Arrays | None = None, **options: Any) -> Any:
    """Merge with the least that the method needs; the base only goes to methods that look at it."""
    known = (BASE if base is None else base) if has_base(method) else None
    chosen = required(method, variant)
    given = statistics_for(method, chosen, models)
    return smelt.merge_tensors(method.name, models, known, parameters=chosen, statistics=given, **options)


def has_base(method: Method) -> bool:
    """Whether the least that it needs has a base; OptMerge does without where the models are factors."""
    return method.base == "required" or method.name == "optmerge"


def as_many(method: Method, models: Sequence[Arrays]) -> Sequence[Arrays]:
    return models[: method.max_models or len(models)]


@pytest.mark.parametrize(("method", "variant"), EVERY)
class TestEveryMethod:
    @pytest.fixture(autouse=True)
    def _searches(self, method: Method, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """In every test: no more order statistics at once than the method tells, and has counters planned for."""
        told: list[int] = []
        asked: list[int] = []

        def surveyed(method: Method, tensors: Any, executor: Any) -> Any:
            told.extend(method.searches(tensor) for tensor in tensors)
            return _survey(method, tensors, executor)

        def counted(requests: Sequence[Any], threads: int) -> Any:
            asked.append(sum(isinstance(request, Rank | Top) for request in requests))
            return reducers_for(requests, threads)

        monkeypatch.setattr("smelt.engine.memory._survey", surveyed)
        monkeypatch.setattr("smelt.engine.execute.reducers_for", counted)
        yield
        assert max(asked, default=0) <= max(told, default=0) or not told

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
        if method.min_models > 1:
            with pytest.raises(UsageError, match=f"{method.name} takes .*, 1 were given"):
                run(method, variant, [X])
            return
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

    @pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
    def test_gives_the_same_bits_through_torch(self, dtype: Any, method: Method, variant: str) -> None:
        """The path of the GPU, on the one torch device that every machine has."""
        pytest.importorskip("torch")
        base, *models = (model(seed, dtype) for seed in range(3))
        runs = [run(method, variant, as_many(method, models), base, device=device) for device in ("cpu", "cpu:0")]
        assert bits(runs[0]) == bits(runs[1])

    def test_refuses_what_it_does_not_know(self, method: Method, variant: str) -> None:
        with pytest.raises(UsageError, match=f"{method.name} has no parameter 'wieght'"):
            smelt.merge_tensors(method.name, as_many(method, [X, Y]), BASE, parameters={"wieght": 1})

    def test_merges_files_as_it_merges_arrays(
        self, method: Method, variant: str, family: Family, tmp_path: Path
    ) -> None:
        chosen = required(method, variant)
        each = {p.name: chosen[p.name] for p in method.parameters if p.per_model and p.name in chosen}
        shared = {name: value for name, value in chosen.items() if name not in each}
        count, needs_base = method.max_models or 2, has_base(method)
        base = family.base if needs_base else None
        tree = recipe(method.name, family.models[:count], base, each=each, parameters=shared)
        given = statistics_for(method, chosen, family.model_arrays[:count])
        for index, entry in enumerate(tree["models"][: len(given)] if any(given) else ()):
            entry["statistics"] = save_statistics(tmp_path / f"statistics{index}.safetensors", given[index])
        smelt.merge(tree, tmp_path / "out", seed=7)
        weight = {"weight": [1.0] * count} if method.parameter("weight") else {}
        weight |= {name: [value] * count for name, value in each.items()}
        arrays = smelt.merge_tensors(
            method.name, family.model_arrays[:count], family.base_arrays if needs_base else None,
            parameters=shared, per_model=weight, seed=7, statistics=given,
        )  # fmt: skip
        assert bits(values(tmp_path / "out")) == bits(arrays)


def spoilt(arrays: Arrays, value: float) -> Arrays:
    bad = {name: array.copy() for name, array in arrays.items()}
    bad["matrix"].reshape(-1)[5] = value
    return bad


#: Where it is the factor of the merged vector on a base, which a value per model is not.
WITH_LAMBDA = [
    n
    for n in smelt.methods.names()
    if (p := smelt.methods.get(n).parameter("lambda"))
    and p.when is None
    and not p.per_model
    and smelt.methods.get(n).base == "required"
]


@pytest.mark.parametrize("name", WITH_LAMBDA)
def test_lambda_zero_is_the_base_bit_for_bit(name: str) -> None:
    method = smelt.methods.get(name)
    parameters = {**required(method, method.variants[0]), "lambda": 0.0}
    given = statistics_for(method, parameters, [X, Y])
    out = smelt.merge_tensors(name, [X, Y], BASE, parameters=parameters, statistics=given)
    assert bits(out) == bits(dict(sorted(BASE.items())))

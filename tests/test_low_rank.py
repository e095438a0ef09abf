"""Adapters on one base, merged from their factors: the numbers, what is read and held, and when it is not done."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.checkpoint import Checkpoint, load_adapted
from smelt.checkpoint.adapter import AdaptedCheckpoint, Adapter, parse
from smelt.engine import execute, memory
from smelt.errors import OperationFailed
from tests.conformance.case import Inputs
from tests.lora import written
from tests.lora_files import factors
from tests.recipes import Family, recipe
from tests.small_models import LAYERS

GOLDEN = Path(__file__).parent / "golden"

Arrays = Mapping[str, Any]

#: Attention and feed-forward, tall and wide, and what no adapter has.
SHAPES = {
    "model.layers.0.self_attn.q_proj": (40, 40), "model.layers.0.mlp.up_proj": (96, 40),
    "model.layers.0.mlp.down_proj": (40, 96), "model.layers.1.mlp.down_proj": (40, 96),
}  # fmt: skip
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "knots": ("knots", {}), "input": ("knots", {"shared": "input"}), "own bars": ("knots", {"scope": "tensor"}),
    "all": ("knots", {"rule": "tv", "density": 1.0, "merge_func": "sum"}), "dropped": ("knots", {"drop_rate": 0.5}),
    "dropped input": ("knots", {"drop_rate": 0.5, "shared": "input"}), "tsv": ("tsv", {"alpha": 0.5}),
    "tsv plain": ("tsv", {"orthogonalise": False, "rank_fraction": 0.05}), "iso_c": ("iso", {"variant": "iso_c"}),
    "iso_c some": ("iso", {"variant": "iso_c", "beta": 0.5, "sigma_over": "rank"}),
    "iso_cts": ("iso", {"variant": "iso_cts"}), "aswudi": ("wudi", {}), "iwudi": ("wudi", {"variant": "iwudi"}),
    "swudi": ("wudi", {"variant": "swudi", "init": "mean"}), "optmerge": ("optmerge", {"mode": "lora"}),
    "auto": ("optmerge", {}),
}  # fmt: skip


def whole(array: Any, step: int) -> Any:
    """Multiples of 1 / step, so that sums and products are exact in fp32."""
    return (np.round(array * step) / step).astype(np.float32)


def base() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    arrays = {f"{name}.weight": whole(draw.standard_normal(shape), 64) for name, shape in SHAPES.items()}
    return {**arrays, "model.norm.weight": whole(draw.standard_normal(40), 64)}


def adapters(shapes: Sequence[Mapping[str, tuple[int, int]]] = (SHAPES, SHAPES, SHAPES)) -> list[Arrays]:
    """Ranks 1, 2, 3."""
    made = (factors(rank, 7, names) for rank, names in enumerate(shapes, 1))
    return [{name: whole(array, 8) for name, array in tensors.items()} for tensors in made]


def rank_of(tensors: Arrays) -> int:
    return next(len(array) for name, array in tensors.items() if "lora_A" in name)


def opened(tensors: Arrays, alpha: float = 0.5) -> Adapter:
    rank = rank_of(tensors)
    return parse(smelt.load(dict(tensors)), {"peft_type": "LORA", "r": rank, "lora_alpha": rank * alpha})


def adapted(start: Checkpoint, tensors: Arrays, alpha: float = 0.5) -> Checkpoint:
    return load_adapted(start, [(opened(tensors, alpha), 1.0)], f"rank {rank_of(tensors)}")


def models(start: Checkpoint, given: Sequence[Arrays] | None = None) -> list[Checkpoint]:
    return [adapted(start, tensors) for tensors in (adapters() if given is None else given)]


def folded(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: checkpoint[name] for name in checkpoint}


def merged(run: str, given: Sequence[Any], start: Any, **more: Any) -> dict[str, Any]:
    method, parameters = RUNS[run]
    return smelt.merge_tensors(method, given, start, parameters=parameters, dtype="float32", **more)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors of adapted models that are read element by element."""
    found: list[str] = []
    original = AdaptedCheckpoint.read

    def read(self: Any, name: str, *given: Any) -> None:
        found.append(name)
        original(self, name, *given)

    monkeypatch.setattr(AdaptedCheckpoint, "read", read)
    return found


@pytest.mark.parametrize("run", RUNS)
def test_factors_give_what_the_models_give(run: str, unread: list[str]) -> None:
    start = smelt.load(base())
    wanted = merged(run, [folded(model) for model in models(start)], base())
    unread.clear()
    found = merged(run, models(start), start)
    assert unread == []
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=4e-6, err_msg=name)
        assert (found[name] != start[name]).any() == (name != "model.norm.weight")


@pytest.mark.parametrize("run", RUNS)
def test_the_bits_do_not_depend_on_threads(run: str) -> None:
    start = smelt.load(base())
    one, many = (merged(run, models(start), start, threads=threads) for threads in (1, 5))
    assert all(one[name].tobytes() == many[name].tobytes() for name in one)


@pytest.mark.parametrize("case", ["ties_top20_mean", "ties_top30_sum_unequal_ranks", "ties_concat_inputs", "tv_mean"])
def test_the_authors_numbers_from_factors(case: str, unread: list[str]) -> None:
    inputs = Inputs(GOLDEN / "knots" / case)
    start = smelt.load(inputs.base)
    given = [
        adapted(start, {f"base_model.model.{name}": array for name, array in tensors.items()}, alpha=1.0)
        for tensors in inputs.each("model")
    ]
    asked = inputs.case["parameters"]
    parameters = {
        "rule": asked["merge_method"], "merge_func": asked["merging_type"], "density": asked["topK"] / 100,
        "alpha": asked["scaling_coeff"], "shared": "output" if asked["concat_across_output"] else "input",
    }  # fmt: skip
    found = smelt.merge_tensors("knots", given, start, parameters=parameters)
    assert len(set(unread)) < len(found)  # the small ones have too many ranks, and are merged beside the others
    for name, wanted in smelt.load(GOLDEN / "knots" / case / "expected.safetensors").items():
        away = ~np.isclose(found[name], wanted, rtol=1e-4, atol=1e-5)
        assert away.mean() <= 0.002, name


# --- when -----------------------------------------------------------------------------------------------------


def test_what_an_adapter_lacks_does_not_change(unread: list[str]) -> None:
    """One module in a single adapter, one in none: zero beside the others, and the base's own bytes."""
    first, second = ({name: SHAPES[name]} for name in list(SHAPES)[:2])
    start = smelt.load(base())
    given = models(start, adapters([{**first, **second}, first]))
    wanted = merged("knots", [folded(model) for model in given], base())
    unread.clear()
    found = merged("knots", given, start)
    assert unread == []
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-6, err_msg=name)
    for name in list(SHAPES)[2:]:
        assert found[f"{name}.weight"].tobytes() == start[f"{name}.weight"].tobytes()


@pytest.mark.parametrize("run", ["knots", "dropped input", "tsv", "iso_c", "aswudi", "auto"])
def test_models_that_are_no_adapters_of_this_base_are_read(run: str) -> None:
    """A fine-tune among them, another base, too many ranks: as if all were plain models."""
    start, other = smelt.load(base()), smelt.load({**base(), "model.norm.weight": np.ones(40, np.float32)})
    tuned = smelt.load({name: array + np.float32(0.125) for name, array in base().items()})
    wide = adapted(start, {name: whole(array, 8) for name, array in factors(18, 7, SHAPES).items()})
    for given in ([*models(start), tuned], models(other), [*models(start), wide]):
        wanted = merged(run, [folded(model) for model in given], base())
        found = merged(run, given, start)
        assert {name: array.tobytes() for name, array in found.items() if "norm" not in name} == {
            name: array.tobytes() for name, array in wanted.items() if "norm" not in name
        }


def test_weights_and_several_adapters_count(unread: list[str]) -> None:
    start, (one, two, three) = smelt.load(base()), adapters()
    joint = load_adapted(start, [(opened(one), 0.5), (opened(two), -2.0)], "both")
    given = [joint, adapted(start, three)]
    wanted = merged("knots", [folded(model) for model in given], base())
    unread.clear()
    found = merged("knots", given, start)
    assert unread == []
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=4e-6, err_msg=name)


def test_factors_that_were_never_trained_give_the_base() -> None:
    start, zero = smelt.load(base()), [{n: a * ("lora_A" in n) for n, a in tensors.items()} for tensors in adapters()]
    for run in RUNS:
        found = merged(run, models(start, zero), start)
        assert all((found[name] == start[name]).all() for name in start), run


def test_factors_that_are_no_numbers_are_an_error() -> None:
    start, broken = smelt.load(base()), adapters()
    name = next(name for name in broken[1] if "lora_B" in name)
    broken[1][name][0, 0] = np.nan
    with pytest.raises(OperationFailed, match=r"rank 2: tensor 'model\.[\w.]+': the adapter's factors hold NaN or Inf"):
        merged("knots", models(start, broken), start)


def test_what_scales_a_result_by_layer_follows(unread: list[str]) -> None:
    start, config = smelt.load(base()), {"num_hidden_layers": 2, "model_type": "llama"}
    lines = {"alpha": 0.5, "beta": 0.5}
    wanted = merged("knots", [folded(model) for model in models(start)], base(), lines=lines, config=config)
    unread.clear()
    found = merged("knots", models(start), start, lines=lines, config=config)
    assert unread == []
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=4e-6, err_msg=name)


# --- plans ----------------------------------------------------------------------------------------------------


@pytest.fixture
def named(family: Family, tmp_path: Path) -> list[str]:
    return [f"{family.base}+{written(tmp_path / f'adapter{seed}', seed)}" for seed in (1, 2)]


@pytest.mark.parametrize("method", ["knots", "tsv"])
def test_a_plan_tells_what_is_read(method: str, family: Family, named: list[str], tmp_path: Path) -> None:
    """The base once, factors once a pass."""
    artifact = smelt.merge(recipe(method, named, family.base), tmp_path / "out")
    sizes = sum(array.nbytes for array in family.base_arrays.values())
    factors = 4 * 2 * 2 * LAYERS * (64 + 64 + 32 + 64)
    assert artifact.bytes_read == sizes + factors * (3 if method == "knots" else 1)
    assert smelt.verify(tmp_path / "out").ok


def test_a_merge_of_factors_is_reproduced_and_tells_adapters_apart(
    family: Family, named: list[str], tmp_path: Path
) -> None:
    smelt.merge(recipe("knots", named, family.base), tmp_path / "out")
    places = {Path(path).name: path for name in named for path in name.split("+")}
    assert smelt.reproduce(tmp_path / "out", places).ok
    inputs = json.loads((tmp_path / "out" / "smelt-manifest.json").read_text())["inputs"]
    assert [item["tensors_read"] for item in inputs] == [2 * LAYERS, 2 * LAYERS, len(family.base_arrays)]
    assert len({item["digest"] for item in inputs}) == 3


@pytest.mark.parametrize("shape", [(1024, 1024), (896, 3584), (3584, 896)])
@pytest.mark.parametrize("run", ["knots", "input", "dropped", "tsv", "iso_cts", "aswudi", "optmerge"])
def test_factors_take_the_memory_that_is_planned(
    run: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, method, peaks = next(iter(SHAPES)), smelt.methods.get(RUNS[run][0]), list[int]()
    start = smelt.load({f"{name}.weight": np.zeros(shape, np.float32)})
    given, seen, original = (
        models(start, [factors(32, seed, {name: shape}) for seed in range(4)]),
        [],
        execute.run_whole,
    )

    def run_whole(*arguments: Any) -> None:
        tracemalloc.start()
        try:
            original(*arguments)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    monkeypatch.setattr(execute, "run_whole", run_whole)
    watched = replace(method, merge=lambda tensor: seen.append(tensor) or method.merge(tensor))
    monkeypatch.setattr(memory, "get", lambda _: watched)
    merged(run, given, start)
    assert 0.9 < method.holds(seen[0])[1] * start[f"{name}.weight"].size / max(peaks) < 1.5

"""What a merge writes: the same bytes whatever the machine, every tensor accounted for, bad values refused."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import smelt
from smelt.engine.tiles import TILE
from smelt.errors import InputRejected, OperationFailed
from tests.readback import nothing_left, stored, values
from tests.recipes import Family, recipe, save_shards
from tests.small_models import CONFIG, Arrays, bf16, fine_tuned, llama, save
from tests.tensors import bits


def normal(shape: tuple[int, ...], seed: int, dtype: Any = np.float32) -> Any:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def trio(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: Any = np.float32
) -> tuple[list[str], list[Arrays]]:
    """A base and two fine-tunes with tensors of these shapes: paths and values."""
    base = {name: normal(shape, 0) for name, shape in shapes.items()}
    models = (base, fine_tuned(base, 1, 0.1), fine_tuned(base, 2, 0.1))
    arrays = [{n: np.asarray(a, dtype) for n, a in model.items()} for model in models]
    return [save(folder / name, model, config={}) for name, model in zip("bxy", arrays, strict=True)], arrays


def merged(tree: Any, out: Path, **options: Any) -> Arrays:
    smelt.merge(tree, out, **options)
    return values(out)


# --- the same bytes -------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "linear": {"each": {"weight": 0.5}},
    "task_arithmetic": {"each": {"weight": 0.5}},
    "ties": {"each": {"weight": 0.5, "density": 0.3}, "parameters": {"variant": "paper"}},
    "ties like mergekit": {"each": {"weight": 0.5, "density": 0.3}},
    "dare_ties": {"each": {"weight": 0.5, "density": 0.3}, "parameters": {"variant": "paper"}},
    "slerp": {"parameters": {"t": 0.4, "dot_threshold": 1.0}},
}
VARIATIONS: list[dict[str, Any]] = [
    {"threads": 1, "memory": "256MiB"},
    {"threads": 1, "memory": "256MiB"},
    {"threads": 2, "memory": "1GiB"},
    {"threads": 4, "memory": "4GiB"},
    {"threads": 4, "memory": "4GiB", "shard_size": "2MB"},
    {"threads": 2, "memory": "256MiB", "shard_size": 1},
]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base and two fine-tunes with tensors of several tiles, beside small ones."""
    shapes = {"a.weight": (1100, 1000), "b.weight": (TILE + 1,), "c.weight": (7, 9), "d.bias": (), "e.empty": (0, 4)}
    return trio(tmp_path_factory.mktemp("large"), shapes, ml_dtypes.bfloat16)[0]


@pytest.mark.parametrize("name", RUNS)
def test_threads_memory_and_shards_do_not_change_a_bit(name: str, large: list[str], tmp_path: Path) -> None:
    base, *experts = large
    method = name.partition(" ")[0]
    tree = recipe(method, experts[: 1 if name == "slerp" else 2], None if name == "linear" else base, **RUNS[name])
    outs = [tmp_path / str(index) / "out" for index in range(len(VARIATIONS))]
    for out, options in zip(outs, VARIATIONS, strict=True):
        out.parent.mkdir()
        smelt.merge(tree, out, seed=5, **options)
    contents = [stored(out) for out in outs]
    assert all(content == contents[0] for content in contents[1:])
    whole = [{path.name: path.read_bytes() for path in out.iterdir()} for out in outs]
    assert whole[0] == whole[1] == whole[2] == whole[3]
    assert [len(list(out.glob("*.safetensors"))) for out in outs] == [1, 1, 1, 1, 2, 5]


def test_the_seed_names_the_draws(family: Family, tmp_path: Path) -> None:
    tree = recipe("dare_ties", family.models[:2], family.base, each={"weight": 1, "density": 0.5})
    first, again = (merged(tree, tmp_path / name, seed=1) for name in ("a", "b"))
    other = merged({**tree, "seed": 2}, tmp_path / "c")
    assert bits(first) == bits(again)
    assert bits(first) != bits(other)
    assert bits(other) == bits(merged(tree, tmp_path / "d", seed=2))


def test_shards_of_the_inputs_do_not_change_a_bit(family: Family, tmp_path: Path) -> None:
    arrays = family.model_arrays[0]
    names = sorted(arrays)
    parts = [{n: arrays[n] for n in names[i::3]} for i in range(3)]
    sharded = save_shards(tmp_path / "sharded", parts)
    whole, split = (
        merged(recipe("task_arithmetic", [model, family.models[1]], family.base), tmp_path / out)
        for model, out in ((family.models[0], "whole"), (sharded, "split"))
    )
    assert bits(whole) == bits(split)


@pytest.mark.parametrize("count", [1, TILE - 1, TILE, TILE + 1, 2 * TILE + 5])
def test_tiles_end_where_they_should(count: int, tmp_path: Path) -> None:
    """The same operations in numpy's float32, in the same order, over the whole tensor at once."""
    paths, (base, x, y) = trio(tmp_path, {"w": (count,)})
    out = merged(recipe("task_arithmetic", paths[1:], paths[0], each={"weight": 0.7}), tmp_path / "out")
    weight, b = np.float32(0.7), base["w"]
    np.testing.assert_array_equal(out["w"], b + (weight * (x["w"] - b) + weight * (y["w"] - b)))


def test_scalars_and_empty_tensors_pass(tmp_path: Path) -> None:
    paths, (base, x, y) = trio(tmp_path, {"scalar": (), "empty": (0,), "flat": (3, 0, 2), "one": (1, 1)})
    out = merged(recipe("linear", paths[1:]), tmp_path / "out")
    assert {name: array.shape for name, array in out.items()} == {name: array.shape for name, array in base.items()}
    assert out["scalar"] == pytest.approx((x["scalar"] + y["scalar"]) / 2)


# --- types ----------------------------------------------------------------------------------------------


def pair(folder: Path, first: Arrays, second: Arrays) -> list[str]:
    return [save(folder / "x", first, config={}), save(folder / "y", second, config={})]


TYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64}


@pytest.mark.parametrize(
    ("first", "second", "options", "wanted"),
    [
        ("BF16", "F16", {}, "F32"),
        ("F32", "BF16", {}, "F32"),
        ("F64", "BF16", {}, "F64"),
        ("F32", "F32", {"out_dtype": "float16"}, "F16"),
        ("F32", "F32", {"dtype": "bfloat16"}, "BF16"),
        ("F64", "F64", {"out_dtype": "bfloat16"}, "BF16"),
    ],
)
def test_types_mix_and_results_round_once(
    first: str, second: str, options: dict[str, Any], wanted: str, tmp_path: Path
) -> None:
    a = normal((50, 3), 1).astype(TYPES[first])
    b = normal((50, 3), 2).astype(TYPES[second])
    tree = recipe("linear", pair(tmp_path, {"w": a}, {"w": b}), **options)
    smelt.merge(tree, tmp_path / "out", force=True)
    found = stored(tmp_path / "out")["w"]
    compute = np.float64 if "F64" in (first, second) else np.float32
    exact = (a.astype(compute) + b.astype(compute)) / compute(2)
    assert found.dtype == wanted
    step = np.abs(exact) * {"F16": 2.0**-11, "BF16": 2.0**-8, "F32": 0, "F64": 0}[wanted]
    assert (np.abs(found.values.astype(np.float64) - exact) <= step + (wanted == "F16") * 2.0**-25).all()


def test_integers_are_copied_and_must_agree(tmp_path: Path) -> None:
    steps = np.arange(6, dtype=np.int64)
    flags = np.array([True, False])
    models = pair(tmp_path, *({"w": normal((8, 8), 0), "steps": steps, "flags": flags} for _ in range(2)))
    out = merged(recipe("linear", models), tmp_path / "out")
    np.testing.assert_array_equal(out["steps"], steps)
    np.testing.assert_array_equal(out["flags"], flags)


def test_integers_that_differ_are_refused(tmp_path: Path) -> None:
    models = pair(tmp_path, *({"w": normal((8, 8), 0), "steps": np.arange(6) + shift} for shift in (0, 1)))
    with pytest.raises(InputRejected, match=r"tensor 'steps' \(I64\) is not merged but copied, and differs between"):
        smelt.merge(recipe("linear", models), tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_floats_and_integers_do_not_mix(tmp_path: Path) -> None:
    models = pair(tmp_path, {"w": normal((8,), 0)}, {"w": np.arange(8, dtype=np.int64)})
    with pytest.raises(InputRejected, match=r"'w': floating in some models and not in others.*F32.*I64"):
        smelt.merge(recipe("linear", models), tmp_path / "out")


# --- tensors that not all models have -------------------------------------------------------------------


def headless(model: Arrays) -> Arrays:
    return {name: array for name, array in model.items() if name != "lm_head.weight"}


def test_a_tied_head_is_lent_by_the_embedding(tmp_path: Path) -> None:
    config = {name: value for name, value in CONFIG.items() if name != "tie_word_embeddings"}
    base = llama(0)
    base["lm_head.weight"] = base["model.embed_tokens.weight"]
    first, second = bf16(fine_tuned(base, 1)), bf16(headless(fine_tuned(base, 2)))
    models = [save(tmp_path / "x", first, config=config), save(tmp_path / "y", second, config=config)]
    out = merged(recipe("linear", models), tmp_path / "out")
    assert out.keys() == first.keys()
    lent = dict(second) | {"lm_head.weight": second["model.embed_tokens.weight"]}
    np.testing.assert_array_equal(out["lm_head.weight"], mean(first["lm_head.weight"], lent["lm_head.weight"]))


def mean(a: Any, b: Any) -> Any:
    return ((a.astype(np.float32) + b.astype(np.float32)) / 2).astype(a.dtype)


@pytest.fixture
def unequal(tmp_path: Path) -> list[str]:
    """Two models, the second of which has one tensor more."""
    first = fine_tuned(llama(0), 1)
    return [save(tmp_path / "x", first), save(tmp_path / "y", {**first, "extra.weight": normal((4, 4), 3)})]


def test_an_extra_tensor_is_refused(unequal: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match=r"tensor 'extra.weight' is in .*y but not in .*x: choose --on-extra"):
        smelt.merge(recipe("linear", unequal), tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_an_extra_tensor_is_copied_or_dropped_and_said(unequal: list[str], tmp_path: Path) -> None:
    copied = smelt.merge(recipe("linear", unequal), tmp_path / "copied", on_extra="copy")
    dropped = smelt.merge(recipe("linear", unequal), tmp_path / "dropped", on_extra="drop")
    np.testing.assert_array_equal(values(copied.path)["extra.weight"], normal((4, 4), 3))
    assert "extra.weight" not in values(dropped.path)
    for artifact, verb in ((copied, "copied"), (dropped, "dropped")):
        assert any("'extra.weight'" in warning and verb in warning for warning in artifact.warnings)


# --- progress, and inputs that do not hold still --------------------------------------------------------


class Watcher:
    """Counts what the engine tells; ``act`` is called at the first step."""

    def __init__(self, act: Any = None) -> None:
        self.events: list[tuple[str, int]] = []
        self._act = act

    def start(self, total_bytes: int, label: str) -> None:
        self.events.append(("start", total_bytes))

    def advance(self, nbytes: int) -> None:
        if self._act is not None:
            act, self._act = self._act, None
            act()
        self.events.append(("advance", nbytes))

    def finish(self) -> None:
        self.events.append(("finish", 0))


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_progress_adds_up(method: str, family: Family, tmp_path: Path) -> None:
    watcher = Watcher()
    tree = recipe(method, family.models[:2], None if method == "linear" else family.base)
    artifact = smelt.merge(tree, tmp_path / "out", progress=watcher)
    kinds = [kind for kind, _ in watcher.events]
    total = artifact.bytes_read + artifact.bytes_written
    assert kinds[0] == "start"
    assert kinds[-1] == "finish"
    assert set(kinds[1:-1]) == {"advance"}
    assert watcher.events[0][1] == total
    assert all(nbytes >= 0 for _, nbytes in watcher.events)
    moved = sum(nbytes for kind, nbytes in watcher.events if kind == "advance")
    assert moved == total if method == "linear" else 0 < moved <= total
    assert artifact.bytes_written == sum(array.nbytes for array in values(artifact.path).values())


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def replace(path: Path) -> None:
    copy = path.with_suffix(".new")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("change", [touch, append, replace, cut])
def test_an_input_that_changes_meanwhile_stops_the_merge(change: Any, family: Family, tmp_path: Path) -> None:
    model = save(tmp_path / "model", family.model_arrays[0])
    watcher = Watcher(lambda: change(tmp_path / "model" / "model.safetensors"))
    with pytest.raises(OperationFailed, match=r"model\.safetensors.*(changed while it was being read|ends early)"):
        smelt.merge(recipe("linear", [model, family.models[1]]), tmp_path / "out", progress=watcher)
    assert watcher.events[-1][0] == "finish"
    assert nothing_left(tmp_path / "out")


def test_single_files_merge_as_their_folders_do(family: Family, tmp_path: Path) -> None:
    """A file among many has no config of its own, unless one lies beside it."""
    bare = []
    for index, arrays in enumerate(family.model_arrays[:2]):
        save(tmp_path / str(index), arrays)
        (tmp_path / str(index) / "config.json").unlink()
        bare.append(tmp_path / str(index) / "model.safetensors")
    smelt.merge(recipe("linear", bare), tmp_path / "files")
    smelt.merge(recipe("linear", family.models[:2]), tmp_path / "folders")
    assert stored(tmp_path / "files") == stored(tmp_path / "folders")
    assert not (tmp_path / "files" / "config.json").exists()
    assert smelt.verify(tmp_path / "files").ok


def test_a_recipe_may_be_text_a_mapping_or_parsed(family: Family, tmp_path: Path) -> None:
    from smelt.recipe import parse

    tree = recipe("linear", family.models[:2])
    file = tmp_path / "recipe.yml"
    file.write_text(json.dumps(tree))
    forms: list[Any] = [tree, file, str(file), parse(file.read_text()), parse(file.read_text())[0]]
    outs = [merged(form, tmp_path / str(index)) for index, form in enumerate(forms)]
    assert all(bits(out) == bits(outs[0]) for out in outs)


def test_inputs_are_left_alone(family: Family, tmp_path: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        files = [path for path in family.folder.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}

    before = state()
    smelt.merge(recipe("linear", family.models), tmp_path / "out")
    assert state() == before


# --- the plan and the result say the same ---------------------------------------------------------------


def test_the_plan_foresees_what_is_written(family: Family, tmp_path: Path) -> None:
    tree = recipe("ties", family.models[:2], family.base, each={"density": 0.5, "weight": 1})
    planned = smelt.plan(tree)
    facts = planned.as_dict()
    planned.close()
    artifact = smelt.merge(tree, tmp_path / "out")
    written = stored(artifact.path)
    assert {row["tensor"]: (row["dtype"], tuple(row["shape"])) for row in facts["rows"]} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in written.items()
    }
    assert facts["disk_needed"] >= sum(path.stat().st_size for path in artifact.path.iterdir())
    assert (facts["bytes_read"], facts["bytes_written"]) == (artifact.bytes_read, artifact.bytes_written)

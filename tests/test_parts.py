"""Results that are more than one model: parts, single tasks, and putting them together again."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import smelt
from smelt.errors import InputRejected, UsageError
from tests.recipes import Family, recipe
from tests.small_models import Arrays
from tests.tensors import BASE, X, Y, Z, bits, model

METHODS = ("tall_masks", "emr_merging")
MODELS = [X, Y, Z]


def parts(method: str, **options: Any) -> dict[str, Any]:
    return smelt.merge_tensors(method, MODELS, BASE, parts=True, **options)


def task(method: str, number: int, **parameters: Any) -> dict[str, Any]:
    return smelt.merge_tensors(method, MODELS, BASE, parameters={"task": number, **parameters})


def flat(arrays: Arrays) -> Any:
    return np.concatenate([arrays[name].ravel() for name in sorted(BASE)])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [0, 2])
def test_parts_and_base_give_the_task_back_bit_for_bit(method: str, number: int, tmp_path: Path) -> None:
    assert bits(smelt.restore_task(parts(method), BASE, number)) == bits(task(method, number))


@pytest.mark.parametrize("method", METHODS)
def test_each_task_s_model_is_nearer_to_it_than_the_unified_one(method: str) -> None:
    merged = flat(smelt.merge_tensors(method, MODELS, BASE))
    for number, own in enumerate(MODELS):
        away = np.linalg.norm(flat(own) - flat(task(method, number)))
        assert away < 0.9 * np.linalg.norm(flat(own) - merged)


@pytest.mark.parametrize("method", METHODS)
def test_one_task_is_kept_exactly(method: str) -> None:
    """Its mask is where it differs from the base, and nothing is rescaled."""
    made = smelt.merge_tensors(method, [X], BASE, parts=True)
    for name, base in BASE.items():
        mask = np.unpackbits(made[f"mask.0/{name}"], count=base.size).reshape(base.shape)
        np.testing.assert_array_equal(mask, X[name] != base)
        np.testing.assert_array_equal(made[f"unified/{name}"], X[name] - base)
    np.testing.assert_allclose(flat(smelt.restore_task(made, BASE, 0)), flat(X), rtol=0, atol=2.0**-21)


def test_masks_are_packed_first_element_highest() -> None:
    base = {"w": np.zeros(11, np.float32)}
    tuned = {"w": np.array([1, 0, 0, 0, 0, 0, 0, 2, 0, 3, 0], np.float32)}
    made = smelt.merge_tensors("tall_masks", [tuned], base, parts=True)
    assert made["mask.0/w"].tolist() == [0b10000001, 0b01000000]


def test_masks_of_long_tensors_join_seamlessly() -> None:
    """More than a tile, and no multiple of eight."""
    size = (1 << 19) + 13
    base = {"w": np.zeros(size, np.float32)}
    tuned = {"w": (np.random.default_rng(0).random(size) < 0.3).astype(np.float32)}
    made = smelt.merge_tensors("tall_masks", [tuned], base, parts=True, threads=3)
    np.testing.assert_array_equal(np.unpackbits(made["mask.0/w"], count=size), tuned["w"])
    np.testing.assert_array_equal(smelt.restore_task(made, base, 0)["w"], tuned["w"])


def test_smaller_lambdas_make_denser_masks() -> None:
    def density(value: float) -> int:
        made = parts("tall_masks", parameters={"lambda": value})
        return sum(int(np.unpackbits(made[f"mask.1/{name}"]).sum()) for name in BASE)

    found = [density(value) for value in (0.0, 0.3, 0.6, 2.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


def test_emr_rescales_to_the_task_s_own_size() -> None:
    for rule, mean in (("tensor_mean", np.mean), ("element", np.sum)):
        own = sum(mean(np.abs(Y[n] - BASE[n])) for n in BASE if BASE[n].size)
        made = task("emr_merging", 1, rescale=rule)
        assert sum(mean(np.abs(made[n] - BASE[n])) for n in BASE if BASE[n].size) == pytest.approx(own, rel=1e-5)


def test_emr_gives_the_base_to_a_task_that_always_loses() -> None:
    base, small, large = ({"w": np.full(4, value, np.float32)} for value in (0, -1, 3))
    lost = smelt.merge_tensors("emr_merging", [small, large], base, parameters={"task": 0})
    np.testing.assert_array_equal(lost["w"], base["w"])


@pytest.mark.parametrize("method", METHODS)
def test_excluded_tensors_are_each_task_s_own(method: str) -> None:
    exclude = {"exclude": ["matrix"]}
    made = parts(method, parameters=exclude)
    assert not {name for name in made if name.endswith("/matrix")} - {f"own.{i}/matrix" for i in range(3)}
    alone = task(method, 1, **exclude)
    np.testing.assert_array_equal(alone["matrix"], Y["matrix"])
    assert bits(smelt.restore_task(made, BASE, 1)) == bits(alone)
    np.testing.assert_array_equal(
        smelt.merge_tensors(method, MODELS, BASE, parameters=exclude)["matrix"], BASE["matrix"]
    )


def test_tied_tensors_are_masked_once_and_restored_under_both_names() -> None:
    base, *models = ({"embed": a["matrix"], "head": a["matrix"]} for a in (BASE, X, Y))
    made = smelt.merge_tensors("emr_merging", models, base, parts=True, tied={"head": "embed"})
    whole = smelt.restore_task(made, base, 0)
    np.testing.assert_array_equal(whole["head"], whole["embed"])
    assert (whole["head"] != base["head"]).any()


def test_narrow_models_make_narrow_parts() -> None:
    base, *models = (model(seed, ml_dtypes.bfloat16) for seed in range(3))
    made = smelt.merge_tensors("tall_masks", models, base, parts=True)
    assert {str(array.dtype) for array in made.values()} == {"bfloat16", "uint8"}
    assert sum(array.nbytes for array in made.values()) < 1.2 * sum(array.nbytes for array in base.values())


def test_torch_gives_the_same_parts() -> None:
    torch = pytest.importorskip("torch")
    for method in METHODS:
        assert bits(parts(method, device="cpu:0")) == bits(parts(method))
    models = [{name: torch.tensor(array) for name, array in arrays.items()} for arrays in (X, Y, BASE)]
    made = smelt.merge_tensors("tall_masks", models[:2], models[2], parts=True)
    restored = smelt.restore_task(made, models[2], 0)
    assert all(isinstance(array, torch.Tensor) for array in restored.values())


# --- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_recipes_write_parts_and_tasks_as_arrays_do(method: str, family: Family, tmp_path: Path) -> None:
    exclude = {"exclude": ["lm_head"]}
    tree = recipe(method, family.models, family.base, parameters=exclude)
    smelt.merge({**tree, "output": {"format": "parts"}}, tmp_path / "parts")
    arrays = smelt.merge_tensors(method, family.model_arrays, family.base_arrays, parameters=exclude, parts=True)
    assert bits(dict(smelt.load(tmp_path / "parts"))) == bits(arrays)
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"model.safetensors", "smelt-manifest.json"}
    assert smelt.verify(tmp_path / "parts").ok

    alone = recipe(method, family.models, family.base, parameters={**exclude, "task": 1}, out_dtype="float32")
    smelt.merge(alone, tmp_path / "task")
    made = dict(smelt.load(tmp_path / "task"))
    direct = smelt.merge_tensors(
        method, family.model_arrays, family.base_arrays, parameters={**exclude, "task": 1}, dtype="float32"
    )
    assert bits(made) == bits(direct)
    restored = smelt.restore_task(tmp_path / "parts", family.base, 1)
    smelt.restore_task(tmp_path / "parts", family.base, 1, tmp_path / "restored")
    assert bits(dict(smelt.load(tmp_path / "restored"))) == bits(restored)
    assert {"config.json", "tokenizer.json"} < {path.name for path in (tmp_path / "restored").iterdir()}
    assert smelt.verify(tmp_path / "restored").ok
    for name, array in made.items():
        np.testing.assert_allclose(np.float32(restored[name]), array, rtol=2.0**-7, atol=2.0**-9)


def test_plans_say_what_is_wrong_with_tasks_and_parts(family: Family) -> None:
    wanted = {
        "task 7: there are 3 models": recipe("emr_merging", family.models, family.base, parameters={"task": 7}),
        "task_arithmetic has no parts": recipe(
            "task_arithmetic", family.models, family.base, output={"format": "parts"}
        ),
        "task has no effect where": recipe(
            "emr_merging", family.models, family.base, parameters={"task": 0}, output={"format": "parts"}
        ),
        "lambda has no effect without task": recipe(
            "tall_masks", family.models, family.base, parameters={"lambda": 0.3}
        ),
    }
    for message, tree in wanted.items():
        with pytest.raises(UsageError, match=message):
            smelt.plan(tree)
    for method in (*METHODS, "consensus"):
        given = {"lambda": 0.3} if method != "emr_merging" else {"rescale": "element"}
        tree = recipe(method, family.models, family.base, parameters=given, output={"format": "parts"})
        smelt.plan(tree).close()


# --- consensus ------------------------------------------------------------------------------------------


def consensus(least: int, **parameters: Any) -> dict[str, Any]:
    return smelt.merge_tensors("consensus", MODELS, BASE, parameters={"min_tasks": least, "alpha": 0.7, **parameters})


@pytest.mark.parametrize("vector", ["sum", "ties_sum"])
def test_more_agreement_resets_more_to_the_base(vector: str) -> None:
    results = [flat(consensus(least, multi_task_vector=vector)) == flat(BASE) for least in range(5)]
    assert all((more >= less).all() for less, more in pairwise(results))
    assert results[-1].all()


def test_consensus_of_none_is_task_arithmetic() -> None:
    plain = smelt.merge_tensors("task_arithmetic", MODELS, BASE, parameters={"lambda": 0.7})
    assert bits(consensus(0)) == bits(plain)


def test_consensus_without_masks_on_ties_is_ties() -> None:
    ties = smelt.merge_tensors("ties", MODELS, BASE, parameters={"lambda": 0.7, "merge_func": "dis-sum"})
    assert bits(consensus(0, multi_task_vector="ties_sum")) == bits(ties)


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters", "more", "message"),
    [
        ("tall_masks", {"task": 3}, {}, "task 3: there are 3 models, counted from 0"),
        ("tall_masks", {"task": -1}, {}, r"task must lie in \[0, inf\)"),
        ("tall_masks", {"task": None, "lambda": None}, {}, "lambda must be a float"),
        ("tall_masks", {"lambda": 0.5}, {}, "lambda has no effect without task"),
        ("tall_masks", {"task": 0}, {"parts": True}, "task has no effect where the parts of all tasks are made"),
        ("emr_merging", {"rescale": "element"}, {}, "rescale has no effect without task"),
        ("task_arithmetic", {}, {"parts": True}, "task_arithmetic has no parts per task"),
    ],
)
def test_wrong_parameters(method: str, parameters: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        smelt.merge_tensors(method, MODELS, BASE, parameters=parameters, **more)


def test_consensus_of_one_model_needs_no_second() -> None:
    smelt.merge_tensors("consensus", [X], BASE)
    with pytest.raises(UsageError, match="min_tasks 2 with one model would reset everything"):
        smelt.merge_tensors("consensus", [X], BASE, parameters={"min_tasks": 2})


def test_parts_of_another_base_are_refused() -> None:
    with pytest.raises(InputRejected, match="no parts of task 3, there are those of 0, 1, 2"):
        smelt.restore_task(parts("tall_masks"), BASE, 3)
    other = {**{n: a for n, a in BASE.items() if n != "row"}, "matrix": np.zeros((2, 2), np.float32)}
    with pytest.raises(InputRejected) as told:
        smelt.restore_task(parts("tall_masks"), other, 0)
    assert len(told.value.problems) == 2

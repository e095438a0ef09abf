"""Values that cannot be merged, and models that should not be: named, refused, and passed where that is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.errors import InputRejected, OperationFailed
from tests.readback import nothing_left, values
from tests.recipes import Family, recipe
from tests.small_models import bf16, llama, save
from tests.tensors import bits

POISONED = "model.layers.1.mlp.up_proj.weight"


def poisoned(family: Family, folder: Path, value: float) -> str:
    """The second fine-tune with one bad element, number 130 of the tensor."""
    arrays = dict(family.model_arrays[1])
    arrays[POISONED] = arrays[POISONED].copy()
    arrays[POISONED].reshape(-1)[130] = value
    return save(folder / "poisoned", arrays)


SUMS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"each": {"density": 0.5}},
    "ties like mergekit": {"each": {"density": 0.5, "weight": 1.0}},
    "dare_ties": {"each": {"density": 0.5, "weight": 1.0}},
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", SUMS)
def test_a_bad_value_names_model_and_tensor(name: str, value: float, family: Family, tmp_path: Path) -> None:
    models = [family.models[0], poisoned(family, tmp_path, value)]
    method = name.partition(" ")[0]
    more = {"parameters": {"variant": "paper"}} if name == "ties" else {}
    tree = recipe(method, models, None if method == "linear" else family.base, **SUMS[name], **more)
    with pytest.raises(
        OperationFailed, match=rf"poisoned: tensor '{POISONED}' holds 1 NaN or Inf.* element 130"
    ) as told:
        smelt.merge(tree, tmp_path / "out")
    assert told.value.exit_code == 1
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize("name", SUMS)
def test_bad_values_pass_where_that_is_wanted(name: str, family: Family, tmp_path: Path) -> None:
    """Only the element that is bad, with a warning or without."""
    models = [family.models[0], poisoned(family, tmp_path, float("nan"))]
    method = name.partition(" ")[0]
    tree = recipe(method, models, None if method == "linear" else family.base, **SUMS[name])
    warned = smelt.merge(tree, tmp_path / "warned", on_nonfinite="warn")
    silent = smelt.merge(tree, tmp_path / "silent", on_nonfinite="allow")
    assert [warning for warning in warned.warnings if f"'{POISONED}'" in warning]
    assert not [warning for warning in silent.warnings if f"'{POISONED}'" in warning]
    for artifact in (warned, silent):
        found = values(artifact.path)
        bad = {n: np.flatnonzero(~np.isfinite(a.astype(np.float32))).tolist() for n, a in found.items()}
        assert {n: places for n, places in bad.items() if places} in ({POISONED: [130]}, {})


def test_a_copied_tensor_is_looked_at_too(family: Family, tmp_path: Path) -> None:
    tree = recipe("passthrough", [poisoned(family, tmp_path, float("inf"))])
    with pytest.raises(OperationFailed, match=rf"poisoned: tensor '{POISONED}' holds 1 NaN or Inf"):
        smelt.merge(tree, tmp_path / "out")
    artifact = smelt.merge(tree, tmp_path / "out", on_nonfinite="allow")
    assert np.isinf(values(artifact.path)[POISONED].astype(np.float32)).sum() == 1


def test_what_does_not_fit_the_output_type_is_refused(tmp_path: Path) -> None:
    big = np.full((4, 4), 70000, np.float32)
    models = [save(tmp_path / str(shift), {"w": big + shift}, config={}) for shift in (0, 1)]
    tree = recipe("linear", models, out_dtype="float16")
    with pytest.raises(OperationFailed, match=r"tensor 'w': 16 results are NaN or Inf in float16.*wider out_dtype"):
        smelt.merge(tree, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_denormals_and_signed_zeros_survive_a_copy(tmp_path: Path) -> None:
    odd = np.array([-0.0, 0.0, 1e-45, -1e-45, 1e-39], np.float32)
    model = save(tmp_path / "x", {"w": odd}, config={})
    artifact = smelt.merge(recipe("passthrough", [model]), tmp_path / "out")
    assert values(artifact.path)["w"].tobytes() == odd.tobytes()


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_singular_gram_matrix_has_the_answer_that_its_inputs_ask_for(rank: int) -> None:
    """Where no input has been, the models' mean stays; where both were seen alike, too."""
    random = np.random.default_rng(rank)
    models = [{"w": random.standard_normal((4, 6)).astype(np.float32)} for _ in range(2)]
    seen = random.standard_normal((6, rank))
    gram = (seen @ seen.T).astype(np.float32)
    parameters = {"reduce_non_diagonal_ratio": 1.0}
    statistics = [{"gram": {"w": gram}}] * 2
    merged = smelt.merge_tensors("regmean", models, statistics=statistics, parameters=parameters)["w"]
    mean = (models[0]["w"] + models[1]["w"]) / 2
    np.testing.assert_allclose(merged, mean, atol=1e-5)


# --- models that should not meet ------------------------------------------------------------------------


def test_the_same_weights_twice_are_warned_about(family: Family, tmp_path: Path) -> None:
    twin = save(tmp_path / "twin", family.model_arrays[0])
    artifact = smelt.merge(recipe("linear", [family.models[0], twin]), tmp_path / "out")
    assert any("are the same model: it counts twice" in warning for warning in artifact.warnings)
    assert bits(values(artifact.path)) == bits(family.model_arrays[0])


def test_the_base_as_an_expert_is_warned_about(family: Family, tmp_path: Path) -> None:
    twin = save(tmp_path / "twin", family.base_arrays)
    artifact = smelt.merge(recipe("task_arithmetic", [family.models[0], twin], family.base), tmp_path / "out")
    assert any("has no task vector" in warning for warning in artifact.warnings)


def test_strangers_are_refused_unless_forced(family: Family, tmp_path: Path) -> None:
    stranger = save(tmp_path / "stranger", bf16(llama(99)))
    tree = recipe("task_arithmetic", [family.models[0], stranger], family.base)
    with pytest.raises(InputRejected, match=r"stranger' does not share the backbone of the base .*--force") as told:
        smelt.merge(tree, tmp_path / "out")
    assert told.value.exit_code == 3
    assert nothing_left(tmp_path / "out")
    artifact = smelt.merge(tree, tmp_path / "out", force=True)
    assert any("does not share the backbone" in warning for warning in artifact.warnings)

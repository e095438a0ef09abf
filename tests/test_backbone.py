"""Whether models share a backbone is told from their weights, by models and by numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smelt import Checkpoint, load
from smelt.engine.backbone import as_floats, compare_backbones, measure, sampled_tensors
from smelt.engine.findings import Finding
from tests.small_models import Arrays, bf16, fine_tuned, llama

BASE = llama(0)


def findings(*models: Arrays, base: Arrays | None = None) -> list[Finding]:
    named = [load(model, label=f"m{index}") for index, model in enumerate(models)]
    return compare_backbones(named, None if base is None else load(base, label="base"))


def sampled(checkpoints: list[Checkpoint]) -> set[str]:
    return set(sampled_tensors(checkpoints, lambda shape: len(shape) == 2))


def summary(found: list[Finding]) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(finding.severity, finding.code, finding.models) for finding in found]


def test_fine_tunes_of_one_base_pass_with_and_without_it() -> None:
    models = [fine_tuned(BASE, seed) for seed in (1, 2, 3)]
    assert findings(*models, base=BASE) == []
    assert findings(*models) == []


def test_independent_networks_of_equal_shapes_are_told_apart() -> None:
    """The disaster that shapes cannot show."""
    (found,) = findings(fine_tuned(BASE, 1), llama(9), base=BASE)
    assert summary([found]) == [("error", "different-backbone", ("m1", "base"))]
    assert abs(found.facts["cosine"]) < 0.1
    assert found.facts["delta_ratio"] == pytest.approx(np.sqrt(2), rel=0.1)
    assert "'m1' does not share the backbone of the base 'base'" in found.message


def test_without_a_base_the_odd_one_out_is_named() -> None:
    models = [fine_tuned(BASE, 1), llama(9), fine_tuned(BASE, 2)]
    assert summary(findings(*models)) == [("error", "different-backbone", ("m1", "m0"))]


def test_two_strangers_without_a_base() -> None:
    assert summary(findings(BASE, llama(9))) == [("error", "different-backbone", ("m1", "m0"))]


@pytest.mark.parametrize(("ratio", "accepted"), [(0.05, True), (0.28, True), (0.4, False), (1.4, False)])
def test_the_limit_lies_at_a_third_of_the_norm(ratio: float, accepted: bool) -> None:
    matrices = {name: array for name, array in BASE.items() if array.ndim == 2}
    assert (findings(fine_tuned(matrices, 1, 0.02 * ratio), base=matrices) == []) is accepted


def test_siblings_may_differ_by_both_of_their_deltas() -> None:
    """Two fine-tunes at 0.28 norms from the base each are 0.4 apart, and still its fine-tunes."""
    matrices = {name: array for name, array in BASE.items() if array.ndim == 2}
    assert findings(fine_tuned(matrices, 1, 0.0056), fine_tuned(matrices, 2, 0.0056)) == []


def test_equal_models_are_warned_about() -> None:
    model = fine_tuned(BASE, 1)
    assert summary(findings(model, dict(model))) == [("warning", "duplicate", ("m0", "m1"))]


def test_the_base_as_a_model_has_no_task_vector() -> None:
    found = findings(fine_tuned(BASE, 1), dict(BASE), base=BASE)
    assert summary(found) == [("warning", "zero-delta", ("m1", "base"))]


def test_a_change_in_one_kind_of_matrix_is_no_duplicate() -> None:
    """A low-rank adapter on one projection, folded in."""
    model = dict(BASE)
    name = "model.layers.1.self_attn.v_proj.weight"
    model[name] = model[name] * np.float32(1.01)
    assert findings(model, base=BASE) == []


def test_a_change_in_the_norms_alone_is_no_duplicate() -> None:
    model = {name: array * np.float32(1.01) if array.ndim == 1 else array for name, array in BASE.items()}
    assert findings(model, base=BASE) == []


@pytest.mark.filterwarnings("error")
def test_values_that_are_no_numbers_do_not_hide_the_rest() -> None:
    broken, stranger = fine_tuned(BASE, 1), llama(9)
    for model in (broken, stranger):
        model["lm_head.weight"][0, :3] = [np.nan, np.inf, -np.inf]
    assert findings(broken, base=BASE) == []
    assert summary(findings(stranger, base=BASE)) == [("error", "different-backbone", ("m0", "base"))]


def test_nothing_comparable_is_said_and_not_guessed() -> None:
    assert summary(findings({"a": np.ones(4, np.float32)}, {"b": np.ones(4, np.float32)})) == [
        ("note", "no-backbone-evidence", ("m0", "m1"))
    ]


def test_one_model_alone_needs_no_comparison() -> None:
    assert findings(BASE) == []


def test_storage_types_do_not_matter() -> None:
    models = [bf16(BASE), {name: array.astype(np.float16) for name, array in BASE.items()}]
    assert findings(*models, base={name: array.astype(np.float64) for name, array in BASE.items()}) == []


def test_integers_and_other_shapes_are_left_out() -> None:
    first: dict[str, Any] = {**BASE, "mask": np.ones((8, 8), np.int64), "odd": np.ones((2, 8), np.float32)}
    second: dict[str, Any] = {**BASE, "mask": np.ones((8, 8), np.int64), "odd": np.ones((8, 2), np.float32)}
    names = sampled([load(first), load(second)])
    assert {"mask", "odd", "model.norm.weight"}.isdisjoint(names)
    assert "lm_head.weight" in names


def test_every_kind_of_matrix_is_sampled_over_the_depth() -> None:
    deep = {f"layers.{i}.{kind}.weight": np.ones((2, 2), np.float32) for i in range(12) for kind in "qv"}
    assert sampled([load(deep), load(deep)]) == {f"layers.{i}.{kind}.weight" for i in (0, 6, 11) for kind in "qv"}


def test_products_are_those_of_the_whole_matrices_when_they_are_small() -> None:
    other = fine_tuned(BASE, 1)
    likeness = measure([load(BASE), load(other)])
    name = "model.layers.0.self_attn.k_proj.weight"
    a, b = (arrays[name].astype(np.float64).ravel() for arrays in (BASE, other))
    expected = np.array([[a @ a, a @ b], [b @ a, b @ b]])
    np.testing.assert_allclose(likeness.products[likeness.names.index(name)], expected, rtol=1e-12)


def test_delta_cosine_of_siblings_seen_from_a_sibling_is_a_half() -> None:
    models = [load(model) for model in (BASE, *(fine_tuned(BASE, seed) for seed in (1, 2, 3)))]
    likeness = measure(models)
    assert likeness.delta_cosine(2, 3, 0) == pytest.approx(0, abs=0.05)
    assert likeness.delta_cosine(2, 3, 1) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("code", ["BF16", "F16", "F32", "F64"])
def test_stored_numbers_are_read_exactly(code: str) -> None:
    from smelt.kernels.dtypes import DTYPES

    values = np.array([0.0, -0.0, 1.5, -3.0e-5, np.inf, -np.inf]).astype(DTYPES[code].values)
    read = as_floats(DTYPES[code].as_storage(values), code)
    np.testing.assert_array_equal(read.astype(np.float64), values.astype(np.float64))

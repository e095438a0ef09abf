"""Tucker forms: what they leave out, and FLoRA adapters made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.adapters.lowrank import Limits
from smelt.adapters.tucker import multiplied, tucker
from tests.lora_files import config_of


def array(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


def low(*shape: int, ranks: tuple[int, ...]) -> Any:
    """An array of these ranks."""
    return multiplied(
        array(*ranks, seed=1), [array(size, rank, seed=rank) for size, rank in zip(shape, ranks, strict=True)]
    )


def test_full_ranks_and_true_ranks_lose_nothing() -> None:
    whole = array(6, 5, 3, 3)
    assert tucker(whole, Limits(1000)).array() == pytest.approx(whole, abs=1e-12)
    true = low(12, 10, 3, 3, ranks=(4, 5, 2, 2))
    found = tucker(true, Limits(1000))
    assert found.ranks == (4, 5, 2, 2)
    assert found.array() == pytest.approx(true, abs=1e-10 * np.linalg.norm(true))


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_the_error_is_what_the_core_lacks_and_sweeps_never_add_to_it(rank: int) -> None:
    whole = array(8, 7, 3, 3)
    found = tucker(whole, Limits(rank))
    error = np.linalg.norm(whole - found.array())
    assert error**2 == pytest.approx(np.linalg.norm(whole) ** 2 - np.linalg.norm(found.core) ** 2)
    first = whole
    for axis, size in enumerate(found.ranks):
        unfolded = np.moveaxis(whole, axis, 0).reshape(whole.shape[axis], -1)
        basis = np.linalg.svd(unfolded, full_matrices=False)[0][:, :size]
        first = np.moveaxis(np.tensordot(basis @ basis.T, first, (1, axis)), 0, axis)
    assert error <= np.linalg.norm(whole - first) * (1 + 1e-9)


@pytest.mark.parametrize("error", [0.8, 0.5, 0.1])
def test_the_error_that_is_asked_for_is_kept(error: float) -> None:
    whole = low(12, 10, 3, 3, ranks=(6, 6, 3, 3)) + 0.3 * array(12, 10, 3, 3, seed=5)
    assert np.linalg.norm(whole - tucker(whole, Limits(1000, error)).array()) <= error * np.linalg.norm(whole)


def test_an_axis_has_no_more_directions_than_the_others_can_fill() -> None:
    found = tucker(array(9, 8, 1, 1), Limits(4))
    assert found.ranks == (4, 4, 1, 1)
    assert tucker(array(20, 2, 2, 1), Limits(1000)).ranks == (4, 2, 2, 1)
    assert 0 in tucker(np.zeros((4, 3, 2, 2)), Limits(2)).ranks


def test_a_flora_adapter_gives_the_fine_tune(tmp_path: Path) -> None:
    """Convolutions and matrices in low rank, the rest whole; the error that is told is that of base+adapter."""
    shapes = {"conv.weight": (8, 6, 3, 3), "a.weight": (9, 5), "b.weight": (5, 4), "b.bias": (5,), "n.weight": (4,)}
    base = {name: array(*shape, seed=2).astype("f4") for name, shape in shapes.items()}
    model = {name: (value + array(*value.shape, seed=3)).astype("f4") for name, value in base.items()}
    smelt.extract_lora(base, model, tmp_path / "whole", form="flora")
    assert config_of(tmp_path / "whole")["peft_type"] == "FLORA"
    assert smelt.verify(tmp_path / "whole").ok
    for name, value in applied(base, tmp_path / "whole", tmp_path).items():
        assert value == pytest.approx(model[name], abs=1e-5), name
    result = smelt.extract_lora(base, model, tmp_path / "part", form="flora", rank=3, factor_dtype="bfloat16")
    got = applied(base, tmp_path / "part", tmp_path)
    errors = {module.module: module.error for module in result.modules}
    for module in ("conv", "a"):
        missing = np.linalg.norm(model[f"{module}.weight"].astype("f8") - got[f"{module}.weight"])
        assert errors[module] == pytest.approx(missing, rel=1e-4)
    assert errors["b"] == 0


def applied(base: Any, adapter: Path, scratch: Path) -> Any:
    from safetensors.numpy import save_file

    save_file(base, scratch / "base.safetensors")
    with smelt.load(f"{scratch / 'base.safetensors'}+{adapter}") as adapted:
        return dict(adapted)


def test_options_that_a_core_makes_idle(tmp_path: Path) -> None:
    model = {"a.weight": array(4, 3).astype("f4")}
    for options in ({"sv_epsilon": 0.1}, {"distribute_scale": False}):
        with pytest.raises(smelt.UsageError, match="no effect with form: flora"):
            smelt.extract_lora(model, model, tmp_path / "out", form="flora", **options)
    with pytest.raises(smelt.UsageError, match="form must be lora or flora"):
        smelt.extract_lora(model, model, tmp_path / "out", form="tucker")  # type: ignore[arg-type]

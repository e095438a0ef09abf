"""One recipe, three kinds of weights: shards of bfloat16, an adapter on a base, and a quantised GGUF file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import smelt
from tests.gguf_files import q8_0, save_llama, unpacked_q8_0
from tests.lora import written
from tests.small_models import Arrays, bf16, fine_tuned, llama, save


def floats(arrays: Arrays) -> Arrays:
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def with_adapter(base: Arrays, folder: Path) -> Arrays:
    """W + alpha / r B A, in float64."""
    stored, dense = load_file(folder / "adapter_model.safetensors"), dict(base)
    for name in [name for name in stored if name.endswith("lora_A.weight")]:
        change = stored[name.replace("lora_A", "lora_B")].astype(np.float64) @ stored[name]
        target = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        dense[target] = (base[target] + 0.01 * change).astype(np.float32)
    return dense


def requantised(arrays: Arrays) -> Arrays:
    return {
        name: unpacked_q8_0(q8_0(array)).reshape(array.shape) if array.ndim > 1 else array
        for name, array in arrays.items()
    }


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_any_weights_in_one_recipe(method: str, tmp_path: Path) -> None:
    """Equal to the merge of what each stands for, computed apart, but for a rounding of the adapted values."""
    start = llama(0)
    base, tuned, packed = bf16(start), bf16(fine_tuned(start, 1)), fine_tuned(start, 2)
    smelt.convert(save(tmp_path / "whole", tuned), tmp_path / "shards", shard_size="60kB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    home, adapter = save(tmp_path / "base", base), written(tmp_path / "adapter", 3)
    names = [str(tmp_path / "shards"), f"{home}+{adapter}", save_llama(tmp_path / "m.gguf", packed, quantised=True)]
    each = {"weight": 0.5} | ({"density": 0.4} if method == "ties" else {})
    recipe = {
        "merge_method": method, "dtype": "float32", **({} if method == "linear" else {"base_model": home}),
        "models": [{"model": name, "parameters": each} for name in names],
    }  # fmt: skip
    smelt.merge(recipe, tmp_path / "out")
    assert smelt.verify(tmp_path / "out").ok
    dense = [floats(tuned), with_adapter(floats(base), adapter), requantised(packed)]
    wanted = smelt.merge_tensors(
        method, dense, None if method == "linear" else floats(base), dtype="float32",
        parameters={} if method == "linear" else {"variant": "mergekit"},
        per_model={key: [value] * 3 for key, value in each.items()},
    )  # fmt: skip
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, wanted[name], rtol=2e-6, atol=1e-8, err_msg=name)

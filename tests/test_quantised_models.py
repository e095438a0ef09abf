"""Quantised models in merges, and quantised inputs that must be refused: one line, which tensor, what was expected."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import smelt
from smelt.checkpoint.memory import MemoryCheckpoint
from smelt.checkpoint.quantised import dequantised
from smelt.errors import InputRejected
from tests.commands import refused_merge
from tests.lora import factors
from tests.readback import stored as published
from tests.recipes import Family, recipe
from tests.small_models import CONFIG, Arrays, bf16, save
from tests.test_layouts import diffusers

FP8 = ml_dtypes.float8_e4m3fn
BLOCK = {"quant_method": "fp8", "weight_block_size": [16, 16]}
CONFIGURED = {**CONFIG, "quantization_config": BLOCK}


def in_blocks(weight: Any, size: int = 16) -> tuple[Any, Any, Any]:
    """Codes and scales of a matrix, and the weight that they stand for."""
    rows, columns = weight.shape
    grid = -(-rows // size), -(-columns // size)
    scales = np.array([0.001, 0.002, 0.0005, 0.004], np.float32)[np.arange(grid[0] * grid[1]) % 4].reshape(grid)
    full = np.repeat(np.repeat(scales, size, 0), size, 1)[:rows, :columns]
    codes = (weight.astype(np.float32) / full).astype(FP8)
    return codes, scales, (codes.astype(np.float32) * full).astype(ml_dtypes.bfloat16)


def quantised_model(folder: Path, model: Arrays) -> tuple[str, Arrays]:
    """An FP8 model on disk, its scales in a shard of their own, and the weights that it stands for."""
    codes, scales, meant = {}, {}, dict(model)
    for name, array in model.items():
        codes[name] = array
        if "proj" in name:
            codes[name], scales[f"{name}_scale_inv"], meant[name] = in_blocks(array)
            scales[f"{name.removesuffix('weight')}input_scale"] = np.ones((), np.float32)
    folder.mkdir()
    shards = {f"model-0000{number}-of-00002.safetensors": part for number, part in enumerate((codes, scales), 1)}
    for file, part in shards.items():
        save_file(part, folder / file, {"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIGURED))
    return str(folder), meant


def test_a_merge_of_quantised_models_is_that_of_their_weights(family: Family, tmp_path: Path) -> None:
    """Bit for bit; nothing in the result speaks of codes, and it verifies."""
    quantised, meant = quantised_model(tmp_path / "fp8", family.model_arrays[0])
    plain = save(tmp_path / "plain", meant)
    out, wanted = tmp_path / "out", tmp_path / "wanted"
    artifact = smelt.merge(recipe("ties", [family.models[1], quantised], quantised, parameters={"density": 0.5}), out)
    smelt.merge(recipe("ties", [family.models[1], plain], plain, parameters={"density": 0.5}), wanted)
    assert {n: (t.dtype, t.data) for n, t in published(out).items()} == {
        n: (t.dtype, t.data) for n, t in published(wanted).items()
    }
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert any("14 quantised weights (fp8) are dequantised" in line for line in artifact.warnings)
    assert any("14 scales of activations are left out" in line for line in artifact.warnings)
    assert smelt.verify(out).ok


def test_a_copy_of_a_quantised_model_is_dequantised(family: Family, tmp_path: Path) -> None:
    quantised, meant = quantised_model(tmp_path / "fp8", family.model_arrays[0])
    smelt.merge({"merge_method": "passthrough", "models": [{"model": quantised}]}, tmp_path / "out")
    found = published(tmp_path / "out")
    assert {name: tensor.data for name, tensor in found.items()} == {n: a.tobytes() for n, a in meant.items()}


def test_a_mapping_shows_weights_and_the_stored_tensors_on_demand(family: Family, tmp_path: Path) -> None:
    quantised, meant = quantised_model(tmp_path / "fp8", family.model_arrays[0])
    with smelt.load(quantised) as model, smelt.load(quantised, as_stored=True) as stored:
        assert set(model) == set(meant)
        assert len(stored) == len(meant) + 28
        assert "quantization_config" not in model.config
        assert "quantization_config" in stored.config


def test_the_config_of_a_text_model_inside_another_one(family: Family, tmp_path: Path) -> None:
    """quantization_config may stand in a section, and then leaves it."""
    model = {"x.weight": in_blocks(np.ones((16, 16)))[0], "x.weight_scale_inv": np.ones((1, 1), np.float32)}
    checkpoint = MemoryCheckpoint(model, "inner")
    checkpoint.config = {"text_config": {"quantization_config": BLOCK, "dtype": "float16"}}
    found = dequantised(checkpoint)
    assert found.tensors["x.weight"].dtype == "F16"
    assert found.config == {"text_config": {"dtype": "float16"}}


def test_int4_experts_in_a_stack(family: Family) -> None:
    """Three dimensions: every expert has a matrix of codes, of scales and of zero points."""
    random = np.random.default_rng(0)
    words = random.integers(-(2**31), 2**31, (3, 16, 8), np.int32)
    scale = random.random((3, 16, 2)).astype(np.float16)
    arguments = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    config = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": arguments}}}
    stored = {"e.weight_packed": words, "e.weight_scale": scale, "e.weight_shape": np.array([3, 16, 64])}
    checkpoint = MemoryCheckpoint(stored, "experts")
    checkpoint.config = {"quantization_config": config}
    nibbles = np.stack([words.view(np.uint8) & 15, words.view(np.uint8) >> 4], -1).reshape(3, 16, 64)
    meant = ((nibbles.astype(np.float32) - 8) * np.repeat(scale, 32, 2).astype(np.float32)).astype(np.float16)
    assert dequantised(checkpoint)["e.weight"].tobytes() == meant.tobytes()


def test_a_grid_that_the_blocks_do_not_fill_is_read() -> None:
    """80: 40 rows in blocks of 16."""
    weight = np.random.default_rng(0).standard_normal((40, 24)).astype(np.float32) * 0.02
    codes, scales, meant = in_blocks(weight)
    checkpoint = MemoryCheckpoint({"x.weight": codes, "x.weight_scale_inv": scales}, "ragged")
    checkpoint.config = {"quantization_config": BLOCK}
    assert dequantised(checkpoint)["x.weight"].tobytes() == meant.tobytes()


# --- what must be refused -------------------------------------------------------------------------------


UNREAD: list[tuple[str, Callable[[Arrays], Arrays], dict[str, Any], str]] = [
    ("86 unknown method", dict, {"quant_method": "hqq"}, r"a quantised checkpoint \('hqq'\), this version reads awq"),
    ("86 no method", dict, {"bits": 4}, r"a quantised checkpoint \('unknown'\)"),
    ("87 nothing quantised", dict, {"quant_method": "gptq"}, "by its config.json, and no tensor is: remove quant"),
    ("87 the reverse", lambda m: m | {"x.qweight": np.zeros((2, 2), np.int32)}, {}, "'x.qweight'.*a part of GPTQ"),
]


@pytest.mark.parametrize(("change", "config", "message"), [row[1:] for row in UNREAD], ids=[row[0] for row in UNREAD])
def test_what_is_not_read_is_not_merged(
    change: Callable[[Arrays], Arrays], config: dict[str, Any], message: str, family: Family, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It can be inspected: only a merge would be wrong."""
    configured = {**CONFIG, "quantization_config": config} if config else CONFIG
    odd = save(tmp_path / "odd", change(bf16(family.base_arrays)), config=configured)
    smelt.load(odd).close()
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(recipe("linear", [family.models[0], odd])))
    code, told = refused_merge(capsys, path, tmp_path / "out")
    assert code == 3
    assert re.search(message, told[0])


def test_an_adapter_on_a_base_in_nf4(tmp_path: Path) -> None:
    """QLoRA: added in float32 to what bitsandbytes itself makes of the codes; written in the base's dtype."""
    target = "model.layers.0.mlp.up_proj"
    stored, expected = {}, {}
    for name, array in load_file(Path(__file__).parent / "data/quantised/bnb_nf4.safetensors").items():
        kind, _, own = name.partition("/")
        (stored if kind == "stored" else expected)[own] = array
    home = tmp_path / "base"
    home.mkdir()
    save_file(stored, home / "model.safetensors")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (home / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": settings}))
    pair = factors({target: (24, 128)}, 1)
    (tmp_path / "style").mkdir()
    save_file(pair, tmp_path / "style/adapter_model.safetensors")
    (tmp_path / "style/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1}))
    a, b = (pair[f"base_model.model.{target}.lora_{part}.weight"].astype(np.float64) for part in "AB")
    exact = expected[f"{target}.weight"].astype(np.float64) + 0.5 * b @ a
    name = f"{home}+{tmp_path / 'style'}"
    with smelt.load(name) as model:
        assert (model.tensors[f"{target}.weight"].dtype, list(model)) == ("F32", [f"{target}.weight"])
        np.testing.assert_allclose(model[f"{target}.weight"], exact, rtol=1e-6, atol=1e-6)
    smelt.merge(recipe("linear", [name]), tmp_path / "out")
    made = load_file(tmp_path / "out/model.safetensors")[f"{target}.weight"]
    assert made.dtype == expected[f"{target}.weight"].dtype
    np.testing.assert_allclose(made.astype(np.float64), exact, rtol=2**-8)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_a_part_of_a_pipeline_in_fp8(tmp_path: Path) -> None:
    """Each part is dequantised by its own config, which then speaks of codes no more."""
    home = diffusers(tmp_path / "a", 0)
    part = home / "text_encoder"
    stored, meant = {}, {}
    for name, array in load_file(part / "model.safetensors").items():
        stored[name] = meant[name] = array
        if "fc1" in name:
            stored[name], stored[f"{name}_scale_inv"], meant[name] = in_blocks(0.01 * array)
    save_file(stored, part / "model.safetensors")
    plain = {**json.loads((part / "config.json").read_text()), "dtype": "bfloat16"}
    (part / "config.json").write_text(json.dumps({**plain, "quantization_config": BLOCK}))
    with smelt.load(home) as model:
        for name, array in meant.items():
            assert model[f"text_encoder.{name}"].tobytes() == array.tobytes()
        assert any("text_encoder: 2 quantised weights" in notice for notice in model.notices)
    smelt.convert(home, tmp_path / "out")
    assert smelt.verify(tmp_path / "out").ok
    assert load_file(tmp_path / "out/text_encoder/model.safetensors").keys() == meant.keys()
    assert "quantization_config" not in (tmp_path / "out/text_encoder/config.json").read_text()
    (part / "config.json").write_text(json.dumps({**plain, "quantization_config": {"quant_method": "eetq"}}))
    save_file(meant, part / "model.safetensors")
    with pytest.raises(InputRejected, match=r"a quantised checkpoint \('eetq'\)"):
        smelt.convert(home, tmp_path / "again")

"""GGUF in: names, layout, config and values of Hugging Face, in checks and merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.checkpoint.gguf import GgufCheckpoint
from tests.gguf_files import LLAMA, gguf_name, packed, permuted, q8_0, save_llama, stored_llama, unpacked_q8_0
from tests.readback import stored
from tests.small_models import CONFIG, Arrays, bf16, fine_tuned, llama, save


def f32(array: Any) -> tuple[int, tuple[int, ...], bytes]:
    return 0, array.shape, np.ascontiguousarray(array, np.float32).tobytes()


@pytest.fixture
def arrays() -> Arrays:
    return llama(1)


def test_a_llama_has_its_names_layout_and_config(tmp_path: Path, arrays: Arrays) -> None:
    with smelt.load(save_llama(tmp_path / "m.gguf", arrays, quantised=False)) as model:
        assert sorted(model) == sorted(arrays)
        for name, array in arrays.items():
            assert model[name].tobytes() == array.tobytes(), name
        assert not model.notices
        for key in CONFIG.keys() - {"torch_dtype"}:
            assert model.config[key] == CONFIG[key], key


def test_any_run_of_a_quantised_tensor_is_read(tmp_path: Path, arrays: Arrays) -> None:
    """Also within a block, within a row, and across the rows of heads that lie elsewhere in the file."""
    random = np.random.default_rng(3)
    with smelt.load(save_llama(tmp_path / "m.gguf", arrays, quantised=True)) as model:
        for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"):
            whole = model[name].reshape(-1)
            values = np.asarray(arrays[name], np.float32)
            heads = 2 if "k_proj" in name else 0
            own = unpacked_q8_0(q8_0(permuted(values, heads) if heads else values)).reshape(values.shape)
            wanted = own.reshape(2, 8, 2, 64).swapaxes(1, 2).reshape(values.shape) if heads else own
            assert whole.tobytes() == wanted.tobytes()
            for _ in range(50):
                start, end = sorted(random.integers(0, len(whole) + 1, 2))
                part = np.empty(end - start, np.float32)
                model.read(name, int(start), part)
                assert part.tobytes() == whole[start:end].tobytes()


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_a_bf16_model_and_a_q8_0_file_merge(tmp_path: Path, arrays: Arrays, method: str) -> None:
    """Against the dense computation on the values that the file stands for."""
    other = fine_tuned(arrays, 2)
    dense = save(tmp_path / "dense", bf16(arrays))
    packed_file = save_llama(tmp_path / "m.gguf", other, quantised=True)
    recipe = {
        "merge_method": method,
        "dtype": "float32",
        "models": [{"model": packed_file, "parameters": {"weight": 0.5}}],
    }
    if method == "linear":
        recipe["models"].append({"model": dense, "parameters": {"weight": 0.5}})  # type: ignore[attr-defined]
    else:
        recipe["base_model"] = dense
    smelt.merge(recipe, tmp_path / "out")
    found = stored(tmp_path / "out")
    with smelt.load(packed_file) as values, smelt.load(dense) as base:
        for name in arrays:
            first, second = base[name].astype(np.float32), values[name]
            np.testing.assert_allclose(found[name].values, (first + second) / 2, rtol=1e-6, atol=1e-8)


def test_a_merge_of_two_files_gets_the_synthesised_config(tmp_path: Path, arrays: Arrays) -> None:
    models = [save_llama(tmp_path / f"{n}.gguf", fine_tuned(arrays, n), quantised=True) for n in (1, 2)]
    smelt.merge({"merge_method": "linear", "models": [
        {"model": model, "parameters": {"weight": 1}} for model in models
    ]}, tmp_path / "out")  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["dtype"], config["num_key_value_heads"]) == ("llama", "bfloat16", 2)
    assert sorted(stored(tmp_path / "out")) == sorted(arrays)


def test_check_tells_relatives_from_strangers(tmp_path: Path, arrays: Arrays) -> None:
    dense = save(tmp_path / "dense", bf16(arrays))
    near = save_llama(tmp_path / "near.gguf", fine_tuned(arrays, 2), quantised=True)
    far = save_llama(tmp_path / "far.gguf", llama(9), quantised=True)
    assert not [finding for finding in smelt.check([dense, near]).findings if finding.severity == "error"]
    assert "different-backbone" in {finding.code for finding in smelt.check([dense, far]).findings}


def test_an_unknown_architecture_keeps_its_names(tmp_path: Path) -> None:
    """And is merged with another of its kind."""
    weight = np.arange(64, dtype=np.float32).reshape(2, 32)
    metadata = {"general.architecture": "novel", "novel.odd": ("f", [1.0, 2.0])}
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(packed(metadata, {"blk.0.odd.weight": f32(weight)}))
    with smelt.load(tmp_path / "a.gguf") as model:
        assert list(model) == ["blk.0.odd.weight"]
        assert "'novel' is not known" in " ".join(model.notices)
    models = [{"model": str(tmp_path / f"{name}.gguf"), "parameters": {"weight": 1}} for name in "ab"]
    smelt.merge({"merge_method": "linear", "models": models}, tmp_path / "out")
    assert stored(tmp_path / "out")["blk.0.odd.weight"].values.tobytes() == weight.tobytes()
    smelt.merge({"merge_method": "linear", "models": models, "output": {"format": "gguf"}}, tmp_path / "again")
    with smelt.load(tmp_path / "again") as made:
        assert isinstance(made, GgufCheckpoint)
        assert made["blk.0.odd.weight"].tobytes() == weight.tobytes()
        assert made.header.metadata["novel.odd"].tolist() == [1.0, 2.0]


def test_gemma_norms_lose_the_one_that_was_added(tmp_path: Path) -> None:
    weight = np.linspace(-0.5, 0.5, 32, dtype=np.float32)
    tensors = {"blk.0.post_ffw_norm.weight": f32(weight + 1), "token_embd.weight": f32(np.ones((4, 32)))}
    (tmp_path / "m.gguf").write_bytes(packed({"general.architecture": "gemma2"}, tensors))
    with smelt.load(tmp_path / "m.gguf") as model:
        found = model["model.layers.0.post_feedforward_layernorm.weight"]
        assert found.tobytes() == ((weight + np.float32(1)) - np.float32(1)).tobytes()
        assert model.config["tie_word_embeddings"]


def test_stacked_experts_are_split(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).standard_normal((3, 4, 32)).astype(np.float32)
    gate = np.ones(32, np.float32)
    tensors = {
        "blk.1.ffn_up_exps.weight": (8, stack.shape, q8_0(stack)), "blk.1.ffn_gate_inp_shexp.weight": f32(gate),
    }  # fmt: skip
    (tmp_path / "m.gguf").write_bytes(packed({"general.architecture": "qwen2moe"}, tensors))
    wanted = unpacked_q8_0(q8_0(stack)).reshape(stack.shape)
    with smelt.load(tmp_path / "m.gguf") as model:
        for expert in range(3):
            assert model[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"].tobytes() == wanted[expert].tobytes()
        assert model.tensors["model.layers.1.mlp.shared_expert_gate.weight"].shape == (1, 32)


def test_experts_one_by_one_as_old_files_have_them(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((3, 4, 32)).astype(np.float32)
    tensors = {f"blk.1.ffn_down.{expert}.weight": f32(weight) for expert, weight in enumerate(weights)}
    metadata = {"general.architecture": "llama", "llama.expert_count": ("I", 3)}
    (tmp_path / "m.gguf").write_bytes(packed(metadata, {**tensors, "blk.1.ffn_down.weight": f32(weights[0])}))
    with smelt.load(tmp_path / "m.gguf") as model:
        for expert, weight in enumerate(weights):
            name = f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"
            assert model[name].tobytes() == weight.tobytes()
        assert model["model.layers.1.mlp.down_proj.weight"].tobytes() == weights[0].tobytes()
        assert (model.config["model_type"], model.config["num_local_experts"]) == ("mixtral", 3)


def test_llama_3_scaling_is_told_from_its_factors(tmp_path: Path, arrays: Arrays) -> None:
    """The factors are those that the converter of llama.cpp makes of the settings."""
    frequencies = 1 / 500000.0 ** (np.arange(0, 64, 2) / 64)
    length = 2 * np.pi / frequencies
    smooth = (8192 / length - 1) / 3
    between = 1 / ((1 - smooth) / 8 + smooth)
    factors = np.where(length < 2048, 1, np.where(length > 8192, 8, between))
    metadata = {**LLAMA, "llama.rope.freq_base": ("f", 500000.0), "llama.rope.dimension_count": ("I", 64)}
    for shift, known in ((0, True), (0.3, False)):
        tensors = {"rope_freqs.weight": f32(factors + shift), "output_norm.weight": f32(np.ones(64))}
        (tmp_path / "m.gguf").write_bytes(packed(metadata, tensors))
        with smelt.load(tmp_path / "m.gguf") as model:
            assert list(model) == ["model.norm.weight"]
            assert ("rope_scaling" in model.config, bool(model.notices)) == (known, not known)
            if known:
                assert model.config["rope_scaling"]["factor"] == 8.0


SPLIT = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")


def split_llama(folder: Path, arrays: Arrays) -> None:
    """A Llama in the two files of a set."""
    tensors = [(name, f32(array)) for name, array in stored_llama(arrays).items()]
    for number, part in enumerate((dict(tensors[:9]), dict(tensors[9:]))):
        split = {"split.no": ("H", number), "split.count": ("H", 2), "split.tensors.count": ("i", len(tensors))}
        (folder / SPLIT[number]).write_bytes(packed({**(LLAMA if number == 0 else {}), **split}, part))


def test_a_split_set_opens_by_any_of_its_files(tmp_path: Path, arrays: Arrays) -> None:
    split_llama(tmp_path, arrays)
    for place in (tmp_path, *(tmp_path / name for name in SPLIT)):
        with smelt.load(place) as model:
            assert sorted(model) == sorted(arrays)
            assert len(model.files()) == 2
            assert model["lm_head.weight"].tobytes() == arrays["lm_head.weight"].tobytes()


def test_the_gguf_package_reads_what_the_test_files_hold(tmp_path: Path, arrays: Arrays) -> None:
    """The files of these tests are GGUF to others too."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(save_llama(tmp_path / "m.gguf", arrays, quantised=True))
    assert {tensor.name for tensor in reader.tensors} == {gguf_name(name) for name in arrays}


def test_a_tokenizer_that_is_left_behind_is_told(tmp_path: Path, arrays: Arrays) -> None:
    metadata = {**LLAMA, "tokenizer.ggml.tokens": [f"t{index}" for index in range(96)]}
    source = save_llama(tmp_path / "m.gguf", arrays, quantised=True, metadata=metadata)
    recipe = {"merge_method": "linear", "models": [{"model": source, "parameters": {"weight": 1}}]}
    assert any("tokenizer is not written" in warning for warning in smelt.merge(recipe, tmp_path / "out").warnings)

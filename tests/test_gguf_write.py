"""GGUF out: what others read of it, what we read back, tokenizers, and what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import smelt
from smelt.checkpoint.gguf import write_gguf
from smelt.checkpoint.gguf.checkpoint import GgufCheckpoint
from smelt.errors import InputRejected, OperationFailed, UsageError
from tests.gguf_files import q8_0, save_llama, stored_llama, unpacked_q8_0
from tests.small_models import CONFIG, HIDDEN, VOCAB, Arrays, bf16, fine_tuned, llama, save

FULL = {**CONFIG, "max_position_embeddings": 2048}
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture
def dense(tmp_path: Path) -> str:
    return save(tmp_path / "dense", bf16(llama(1)), config=FULL)


def written(source: Any, path: Path, dtype: str = "Q8_0") -> GgufCheckpoint:
    write_gguf(smelt.load(source), path, dtype)
    found = smelt.load(path)
    assert isinstance(found, GgufCheckpoint)
    return found


# --- tensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0"])
def test_what_is_written_is_read_back(tmp_path: Path, dense: str, dtype: str) -> None:
    """Exactly, where the type holds bfloat16; quantised as the format's own quantiser does."""
    values = {name: array.astype(np.float32) for name, array in bf16(llama(1)).items()}
    with written(dense, tmp_path / "m.gguf", dtype) as model:
        assert sorted(model) == sorted(values)
        for name, array in values.items():
            found = model[name].astype(np.float32)
            if array.ndim > 1 and dtype == "Q8_0":
                array = unpacked_q8_0(q8_0(array)).reshape(array.shape)
            if array.ndim > 1 and dtype == "F16":
                array = array.astype(np.float16).astype(np.float32)
            assert found.tobytes() == array.tobytes(), name
        for key in FULL.keys() - {"torch_dtype"}:
            assert model.config[key] == FULL[key]


def test_rows_that_blocks_do_not_fill_are_float16(tmp_path: Path) -> None:
    arrays = {"model.embed_tokens.weight": np.ones((4, 40), np.float32), "model.norm.weight": np.ones(40, np.float32)}
    with written(save(tmp_path / "m", arrays, config=FULL), tmp_path / "m.gguf") as model:
        assert {name: info.dtype for name, info in model.tensors.items()} == {
            "model.embed_tokens.weight": "F16", "model.norm.weight": "F32",
        }  # fmt: skip


def test_the_gguf_package_reads_the_same_values(tmp_path: Path, dense: str) -> None:
    gguf = pytest.importorskip("gguf")
    written(dense, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    wanted = stored_llama({name: array.astype(np.float32) for name, array in bf16(llama(1)).items()})
    assert {tensor.name for tensor in reader.tensors} == wanted.keys()
    for tensor in reader.tensors:
        values = wanted[tensor.name]
        packed = gguf.quantize(values, tensor.tensor_type) if values.ndim > 1 else values
        assert tensor.data.tobytes() == packed.tobytes(), tensor.name
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0


SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Gemma2"])
def test_transformers_reads_the_same_model(tmp_path: Path, kind: str) -> None:
    """A model that transformers made, written by smelt, and read by transformers."""
    for needed in ("gguf", "torch", "accelerate"):
        pytest.importorskip(needed)
    import torch
    import transformers

    gemma = {"head_dim": 16, "query_pre_attn_scalar": 16} if kind == "Gemma2" else {}
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SMALL, **gemma))
    for parameter in made.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    made.save_pretrained(tmp_path / "m")
    written(tmp_path / "m", tmp_path / "m.gguf", "F32").close()
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    first, second = made.state_dict(), read.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


GEMMA = {
    **FULL, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "head_dim": 16, "sliding_window": 512,
    "tie_word_embeddings": True,
}  # fmt: skip
MOE = {
    **FULL, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16, "num_experts": 2,
    "num_experts_per_tok": 1, "moe_intermediate_size": 64,
}  # fmt: skip
NORMS = ("post_feedforward_layernorm", "pre_feedforward_layernorm")


def gemma() -> Arrays:
    arrays = {name: array for name, array in llama(1).items() if name != "lm_head.weight"}
    more = {f"model.layers.{i}.{norm}.weight": np.full(HIDDEN, 0.25, np.float32) for i in (0, 1) for norm in NORMS}
    heads = {f"model.layers.{i}.self_attn.{x}_norm.weight": np.ones(16, np.float32) for i in (0, 1) for x in "qk"}
    return {**arrays, **more, **heads}


MIXTRAL = {
    **FULL, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 3,
    "num_experts_per_tok": 2,
}  # fmt: skip
SHARED = {
    **MOE, "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 3,
    "shared_expert_intermediate_size": 64,
}  # fmt: skip


def experts(count: int = 2, shared: bool = False) -> Arrays:
    """As Qwen's mixtures have them."""
    random = np.random.default_rng(0)
    arrays = {name: array for name, array in llama(1).items() if "mlp" not in name}
    homes = [f"experts.{expert}" for expert in range(count)] + ["shared_expert"] * shared
    for layer in (0, 1):
        block = f"model.layers.{layer}.mlp"
        arrays[f"{block}.gate.weight"] = random.standard_normal((count, HIDDEN)).astype(np.float32)
        if shared:
            arrays[f"{block}.shared_expert_gate.weight"] = random.standard_normal((1, HIDDEN)).astype(np.float32)
        for home in homes:
            for part in ("gate_proj", "up_proj", "down_proj"):
                shape = (HIDDEN, 32) if part == "down_proj" else (32, HIDDEN)
                arrays[f"{block}.{home}.{part}.weight"] = random.standard_normal(shape).astype(np.float32)
    return arrays


def mixtral() -> Arrays:
    words = {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    return {".".join(words.get(word, word) for word in name.split(".")): a for name, a in experts(3).items()}


@pytest.mark.parametrize(
    ("config", "arrays"), [(GEMMA, gemma()), (MOE, experts()), (SHARED, experts(3, True)), (MIXTRAL, mixtral())],
    ids=["gemma3", "qwen3_moe", "qwen2_moe", "mixtral"],
)  # fmt: skip
def test_other_families_come_back(tmp_path: Path, config: Mapping[str, Any], arrays: Arrays) -> None:
    """Norms that are stored with 1 added, and experts that are stored as one tensor."""
    with written(save(tmp_path / "m", arrays, config=config), tmp_path / "m.gguf", "F32") as model:
        assert sorted(model) == sorted(arrays)
        for name, array in arrays.items():
            assert model[name].shape == array.shape
            np.testing.assert_allclose(model[name], array, atol=1e-7)
        for key in config.keys() - {"torch_dtype", "hidden_act"}:
            assert model.config[key] == config[key], key


def test_experts_are_stacked_as_llama_cpp_has_them(tmp_path: Path) -> None:
    """One tensor for all of a layer, the experts in order; quantised rows are whole blocks of their expert."""
    gguf = pytest.importorskip("gguf")
    arrays = mixtral()
    written(save(tmp_path / "m", arrays, config=MIXTRAL), tmp_path / "m.gguf").close()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for inner, part in (("ffn_gate_exps", "w1"), ("ffn_up_exps", "w3"), ("ffn_down_exps", "w2")):
        tensor = stored[f"blk.1.{inner}.weight"]
        each = [arrays[f"model.layers.1.block_sparse_moe.experts.{expert}.{part}.weight"] for expert in range(3)]
        assert tensor.shape.tolist() == [*reversed(each[0].shape), 3]
        assert tensor.data.tobytes() == gguf.quantize(np.stack(each), gguf.GGMLQuantizationType.Q8_0).tobytes()
    assert stored["blk.1.ffn_gate_inp.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_llama_3_scaling_comes_back(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    config = {**FULL, "rope_theta": 500000.0, "head_dim": 64, "num_attention_heads": 1, "num_key_value_heads": 1,
              "rope_scaling": scaling}  # fmt: skip
    arrays = {name: array for name, array in llama(1).items() if "self_attn" not in name}
    with written(save(tmp_path / "m", arrays, config=config), tmp_path / "m.gguf") as model:
        assert model.config["rope_scaling"] == scaling
        assert sorted(model) == sorted(arrays)


def test_the_factors_of_phi_3_come_back(tmp_path: Path) -> None:
    scaling = {"rope_type": "longrope", "long_factor": [1.5, 2.25, 3.1, 4.0], "short_factor": [1.0, 1.1, 1.2, 1.3]}
    config = {**FULL, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.5,
              "rope_scaling": scaling, "original_max_position_embeddings": 1024}  # fmt: skip
    arrays = {name: array for name, array in llama(1).items() if "layers" not in name}
    with written(save(tmp_path / "m", arrays, config=config), tmp_path / "m.gguf") as model:
        assert sorted(model) == sorted(arrays)
        for key in ("rope_scaling", "original_max_position_embeddings", "partial_rotary_factor"):
            assert model.config[key] == config[key]
        assert model.header.metadata["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + 1 / 10) ** 0.5)
        assert model.header.metadata["phi3.attention.sliding_window"] == 0


# --- through a recipe -----------------------------------------------------------------------------------


def recipe(*models: str, **output: str) -> dict[str, Any]:
    return {
        "merge_method": "linear", "output": {"format": "gguf", **output},
        "models": [{"model": model, "parameters": {"weight": 1}} for model in models],
    }  # fmt: skip


def test_a_merge_is_written_as_q8_0(tmp_path: Path, dense: str) -> None:
    """Computed in float32 and quantised once; the manifest's digests are those of what is read."""
    other = save(tmp_path / "other", bf16(fine_tuned(llama(1), 2)), config=FULL)
    smelt.merge(recipe(dense, other, dtype="q8_0"), tmp_path / "out", threads=2)
    assert smelt.verify(tmp_path / "out").ok
    with smelt.load(tmp_path / "out") as model, smelt.load(dense) as first, smelt.load(other) as second:
        for name in first:
            mean = (first[name].astype(np.float32) + second[name].astype(np.float32)) / np.float32(2)
            wanted = unpacked_q8_0(q8_0(mean)).reshape(mean.shape) if mean.ndim > 1 else mean
            assert model[name].tobytes() == wanted.tobytes()


def test_tensors_that_are_only_copied_are_quantised_too(tmp_path: Path, dense: str) -> None:
    other = save(tmp_path / "other", bf16(fine_tuned(llama(1), 2)), config=FULL)
    smelt.merge({**recipe(dense, other, dtype="q8_0"), "only": ["mlp"]}, tmp_path / "out")
    assert smelt.verify(tmp_path / "out").ok
    with smelt.load(tmp_path / "out") as model:
        for name in ("lm_head.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"):
            values = bf16(llama(1))[name].astype(np.float32)
            wanted = unpacked_q8_0(q8_0(values)).reshape(values.shape) if values.ndim > 1 else values
            assert model[name].tobytes() == wanted.tobytes()


def test_what_another_document_takes_is_no_gguf(tmp_path: Path, dense: str) -> None:
    text = (
        f"name: first\nmerge_method: linear\nmodels: [{{model: {dense}, parameters: {{weight: 1}}}}]\n"
        "output: {format: gguf}\n---\nmerge_method: linear\nmodels: [{model: first, parameters: {weight: 1}}]\n"
    )
    (tmp_path / "r.yml").write_text(text)
    with pytest.raises(UsageError, match=r"r\.yml:4:1: a result that another document takes"):
        smelt.merge(tmp_path / "r.yml", tmp_path / "out")


def test_the_same_merge_gives_the_same_bytes(tmp_path: Path, dense: str) -> None:
    other = save(tmp_path / "other", bf16(fine_tuned(llama(1), 2)), config=FULL)
    files = []
    for threads in (1, 3):
        smelt.merge(recipe(dense, other), tmp_path / f"out{threads}", threads=threads)
        files.append((tmp_path / f"out{threads}" / "model.gguf").read_bytes())
    assert files[0] == files[1]
    with smelt.load(tmp_path / "out1") as model:
        assert model.tensors["lm_head.weight"].dtype == "BF16"


def test_a_merge_of_gguf_files_keeps_the_first_ones_tokenizer(tmp_path: Path, dense: str) -> None:
    (tmp_path / "dense" / "tokenizer.json").write_text(json.dumps(byte_level(LETTERS % r"\p{N}{1,3}")))
    written(dense, tmp_path / "m.gguf").close()
    other = save_llama(tmp_path / "other.gguf", fine_tuned(llama(1), 2), quantised=True)
    smelt.merge(recipe(str(tmp_path / "m.gguf"), other, dtype="float16"), tmp_path / "out")
    with smelt.load(tmp_path / "m.gguf") as first, smelt.load(tmp_path / "out") as merged:
        assert isinstance(first, GgufCheckpoint)
        assert isinstance(merged, GgufCheckpoint)
        own, made = first.header.metadata, merged.header.metadata
        assert own.keys() - made.keys() == {"general.quantization_version"}
        for key in own.keys() & made.keys() - {"general.file_type", "general.name"}:
            assert np.array_equal(own[key], made[key]), key
        assert merged.header.metadata["tokenizer.ggml.pre"] == "llama-bpe"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"format": "gguf", "dtype": "q4_k"}, "dtype must be"),
        ({"format": "safetensors", "dtype": "q8_0"}, "say format: gguf too"),
        ({"format": "gguf", "shard_size": "1GB"}, "written whole"),
    ],
)
def test_output_options_that_do_not_fit(tmp_path: Path, dense: str, output: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        smelt.merge({**recipe(dense, dense), "output": output}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- tokenizers -----------------------------------------------------------------------------------------


def byte_level(pattern: str | None, **more: Any) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": pattern is None}
    return {
        "normalizer": None, "added_tokens": [{"id": 4, "content": "<|end|>", "special": True, "normalized": False}],
        "pre_tokenizer": last if pattern is None else {"type": "Sequence", "pretokenizers": [split, last]},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "abb": 3}, "merges": ["a b", ["ab", "b"]]}, **more,
    }  # fmt: skip


def metadata(tmp_path: Path, **files: str | bytes) -> Mapping[str, Any]:
    """Of a model with these files (an underscore for each dot but the last)."""
    source = save(tmp_path / "m", bf16(llama(1)), config={**FULL, "eos_token_id": 4})
    for name, content in files.items():
        place = tmp_path / "m" / name.replace("__", ".")
        place.write_bytes(content if isinstance(content, bytes) else content.encode())
    model = written(source, tmp_path / "m.gguf")
    model.close()
    return model.header.metadata


@pytest.mark.parametrize(
    ("pattern", "name", "normal"),
    [
        (LETTERS % r"\p{N}{1,3}", "llama-bpe", None), (LETTERS % r"\p{N}", "qwen2", {"type": "NFC"}),
        (LETTERS % r"\p{N}", "deepseek-r1-qwen", {"type": "Sequence", "normalizers": []}), (None, "gpt-2", None),
    ],
)  # fmt: skip
def test_byte_level_tokenizers_are_told_by_their_content(
    tmp_path: Path, pattern: str | None, name: str, normal: Any
) -> None:
    config = json.dumps({"chat_template": "{{ x }}", "eos_token": "<|end|>"})
    tree = byte_level(pattern, normalizer=normal)
    found = metadata(tmp_path, tokenizer__json=json.dumps(tree), tokenizer_config__json=config)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", name)
    tokens = found["tokenizer.ggml.tokens"].decoded()
    assert tokens[:6] == ["a", "b", "ab", "abb", "<|end|>", "[PAD5]"]
    assert len(tokens) == VOCAB
    assert found["tokenizer.ggml.token_type"][:6].tolist() == [1, 1, 1, 1, 3, 5]
    assert found["tokenizer.ggml.merges"].decoded() == ["a b", "ab b"]
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.add_bos_token"]) == (4, False)
    assert found["tokenizer.chat_template"] == "{{ x }}"


def piece(text: str, score: float, kind: int) -> bytes:
    raw = text.encode()
    body = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(body)]) + body


def test_sentencepiece_models_are_read(tmp_path: Path) -> None:
    pieces = [("<unk>", 0, 2), ("<s>", 0, 3), ("<0x00>", 0, 6), ("\u2581a", -1.5, 1)]
    model = b"".join(piece(*each) for each in pieces) + b"\x12\x02\x18\x02" + b"\x1a\x02\x18\x00"
    added = json.dumps({"added_tokens_decoder": {
        "0": {"content": "<unk>", "special": True}, "5": {"content": "\u2581new", "special": False},
    }})  # fmt: skip
    found = metadata(tmp_path, tokenizer__model=model, tokenizer_config__json=added)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.tokens"].decoded()[:7] == [
        "<unk>", "<s>", "<0x00>", "\u2581a", "[PAD4]", " new", "[PAD6]",
    ]  # fmt: skip
    assert found["tokenizer.ggml.token_type"][:6].tolist() == [2, 3, 6, 1, 5, 4]
    assert found["tokenizer.ggml.scores"][3:6].tolist() == [-1.5, -10000.0, -1000.0]
    assert found["tokenizer.ggml.add_space_prefix"] is False


def test_bpe_with_byte_fallback_gets_scores_in_the_order_of_its_merges(tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ]},
        "pre_tokenizer": None, "added_tokens": [],
        "model": {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "merges": ["a b", "ab b", "a bb"],
                  "vocab": {"<unk>": 0, "<0x00>": 1, "a": 2, "b": 3, "abb": 4, "ab": 5}},
    }  # fmt: skip
    found = metadata(tmp_path, tokenizer__json=json.dumps(tree))
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    assert found["tokenizer.ggml.token_type"][:6].tolist() == [2, 6, 1, 1, 1, 1]
    scores = found["tokenizer.ggml.scores"]
    assert scores[5] > scores[4] > scores[2] == scores[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "the normalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "the pre-tokenizer .* understood are those of gpt-2"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "'WordPiece' model"),
        ({"model": {"type": "BPE"}}, "not of a known layout: .*vocab"),
        ({"added_tokens": [{"id": VOCAB, "content": "x"}]}, f"has the id {VOCAB}, the embedding {VOCAB} rows"),
    ],
)
def test_a_tokenizer_that_is_not_understood_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRejected, match=message):
        metadata(tmp_path, tokenizer__json=json.dumps({**byte_level(None), **change}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "arrays", "message"),
    [
        ({**FULL, "model_type": "bert"}, {}, "model type 'bert' is not written to GGUF"),
        ({**FULL, "max_position_embeddings": None}, {}, "max_position_embeddings = None"),
        (FULL, {"model.odd.weight": np.ones((2, 32), np.float32)}, "'model.odd.weight' has no place"),
        ({**FULL, "num_attention_heads": 5}, {}, "not those of 5 heads"),
        ({**FULL, "hidden_act": "gelu"}, {}, "hidden_act = 'gelu', llama.cpp always computes with 'silu'"),
        ({**FULL, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {}, "by 'dynamic'"),
        (FULL, {"model.norm.weight": np.ones(64, np.int64)}, "no floating numbers"),
    ],
)
def test_a_model_that_gguf_does_not_hold(tmp_path: Path, config: Any, arrays: Arrays, message: str) -> None:
    source = save(tmp_path / "m", {**llama(1), **arrays}, config=config)
    with pytest.raises(InputRejected, match=message):
        write_gguf(smelt.load(source), tmp_path / "m.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "F32"), (1e9, "F16"), (1e8, "Q8_0")])
def test_values_that_a_type_does_not_hold_leave_nothing(tmp_path: Path, value: float, dtype: str) -> None:
    arrays = llama(1)
    arrays["lm_head.weight"][3, 3] = value
    source = save(tmp_path / "m", arrays, config=FULL)
    with pytest.raises(OperationFailed, match=r"lm_head\.weight"):
        write_gguf(smelt.load(source), tmp_path / "m.gguf", dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_a_file_that_exists_is_kept(tmp_path: Path, dense: str) -> None:
    (tmp_path / "m.gguf").write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists"):
        write_gguf(smelt.load(dense), tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"mine"


def test_a_quantised_file_can_be_written_again(tmp_path: Path) -> None:
    """From GGUF to GGUF: what Q8_0 stands for is quantised to the same codes."""
    source = save_llama(tmp_path / "a.gguf", llama(1), quantised=True)
    write_gguf(smelt.load(source), tmp_path / "b.gguf", "F32")
    with smelt.load(source) as first, smelt.load(tmp_path / "b.gguf") as second:
        assert all(first[name].astype(ml_dtypes.bfloat16).tobytes() ==
                   second[name].astype(ml_dtypes.bfloat16).tobytes() for name in first)  # fmt: skip

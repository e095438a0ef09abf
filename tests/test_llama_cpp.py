"""llama.cpp loads what we write, cuts text as the tokenizer does, and computes what PyTorch computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.checkpoint.gguf import write_gguf
from tests.llama_cpp import asked

pytest.importorskip("xllamacpp")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = 400
SIZES = {
    "vocab_size": TOKENS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [1.5 + i for i in range(8)],
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}
#: Kind, settings beside the sizes, and how far log-probabilities may be off: llama.cpp's GELU is a table of halves.
MODELS: dict[str, tuple[str, dict[str, Any], float]] = {
    "llama": ("Llama", {}, 1e-4),
    "llama, scaled": ("Llama", {"rope_parameters": LLAMA_3}, 1e-4),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}, 1e-4),
    "mistral": ("Mistral", {"sliding_window": None}, 1e-4),
    "qwen2": ("Qwen2", {}, 1e-4),
    "qwen3": ("Qwen3", {"head_dim": 32}, 1e-4),
    "gemma": ("Gemma", {"head_dim": 16}, 1e-2),
    "gemma2": ("Gemma2", GEMMA, 1e-2),
    "gemma3": ("Gemma3Text", {**GEMMA, "sliding_window": 16}, 1e-2),
    "phi3": ("Phi3", {}, 1e-4),
    "phi3, long": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16}, 1e-4),
    "mixtral": ("Mixtral", {"num_local_experts": 4}, 1e-4),
    "qwen2moe": ("Qwen2Moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64}, 1e-4),
    "qwen3moe": ("Qwen3Moe", {**EXPERTS, "num_experts": 4, "head_dim": 16, "norm_topk_prob": True}, 1e-4),
}
PROMPTS = np.random.default_rng(1).integers(3, TOKENS, (3, 40)).tolist()
TEXTS = [
    "Hello world", " leading", "  def f(x):\n\treturn x+1\n\n\n", "é ü 中文 😀 12345 2026",
    "<|im_start|>user\nhi<|im_end|>", "it's WE'LL   \n  x", " ", "a" * 50 + "\r\n", "x  <|im_end|>  y", "\u2581odd",
]  # fmt: skip
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Any:
    """As Qwen's, learnt from the sources of the standard library."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(QWEN), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([Path(json.__file__).read_text()], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")


def with_fallback() -> Any:
    """As Llama 2's: spaces are letters, unknown letters fall apart into bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(Path(json.__file__).read_text().split(), trainer)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def saved(folder: Path, kind: str, more: dict[str, Any], tokenizer: Any, seed: int = 0) -> Any:
    """A model with random weights, as ``save_pretrained`` writes it."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def following(model: Any) -> Any:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor(PROMPTS)).logits[:, -1].double(), -1).numpy()


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_the_same(tmp_path: Path, name: str) -> None:
    kind, more, tolerance = MODELS[name]
    tokenizer = byte_level()
    model = saved(tmp_path / "m", kind, more, tokenizer)
    write_gguf(smelt.load(tmp_path / "m"), tmp_path / "m.gguf", "F32")
    told = asked(tmp_path / "m.gguf", PROMPTS, TEXTS, TOKENS)
    np.testing.assert_allclose(np.array(told["following"], float), following(model), atol=tolerance)
    assert told["tokens"] == tokenizer(TEXTS)["input_ids"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("F16", 0.05), ("BF16", 0.3), ("Q8_0", 0.5)])
def test_it_reads_every_type_that_we_write(tmp_path: Path, dtype: str, tolerance: float) -> None:
    """Log-probabilities span 7 here."""
    model = saved(tmp_path / "m", "Llama", {}, byte_level())
    write_gguf(smelt.load(tmp_path / "m"), tmp_path / "m.gguf", dtype)
    told = asked(tmp_path / "m.gguf", PROMPTS, [], TOKENS)
    np.testing.assert_allclose(np.array(told["following"], float), following(model), atol=tolerance)


def test_it_cuts_text_as_a_tokenizer_with_byte_fallback(tmp_path: Path) -> None:
    tokenizer = with_fallback()
    saved(tmp_path / "m", "Llama", {}, tokenizer)
    write_gguf(smelt.load(tmp_path / "m"), tmp_path / "m.gguf", "F32")
    assert asked(tmp_path / "m.gguf", [], TEXTS, TOKENS)["tokens"] == tokenizer(TEXTS)["input_ids"]


def test_it_computes_what_was_merged(tmp_path: Path) -> None:
    first, second = (saved(tmp_path / str(seed), "Llama", {}, byte_level(), seed) for seed in (0, 1))
    models = [{"model": str(tmp_path / str(seed)), "parameters": {"weight": 1}} for seed in (0, 1)]
    recipe = {"merge_method": "linear", "models": models, "output": {"format": "gguf", "dtype": "float32"}}
    smelt.merge(recipe, tmp_path / "out", force=True)  # they have nothing in common
    with torch.no_grad():
        for mine, other in zip(first.parameters(), second.parameters(), strict=True):
            mine.copy_((mine + other) / 2)
    told = asked(tmp_path / "out" / "model.gguf", PROMPTS, TEXTS, TOKENS)
    np.testing.assert_allclose(np.array(told["following"], float), following(first), atol=1e-4)

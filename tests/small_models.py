"""Synthetic checkpoints for tests: a Llama of two layers, its fine-tunes, and how they look on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Arrays = dict[str, npt.NDArray[Any]]

HIDDEN, MLP, LAYERS, VOCAB = 64, 128, 2, 96
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN,
    "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCAB, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}  # fmt: skip
TOKENS = [f"token{index}" for index in range(VOCAB)]


def shapes(vocabulary: int = VOCAB) -> dict[str, tuple[int, ...]]:
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 2, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP),
        "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    layers = {f"model.layers.{i}.{k}.weight": shape for i in range(LAYERS) for k, shape in layer.items()}
    ends = {"model.embed_tokens.weight": (vocabulary, HIDDEN), "lm_head.weight": (vocabulary, HIDDEN)}
    return {**ends, **layers, "model.norm.weight": (HIDDEN,)}


def llama(seed: int, vocabulary: int = VOCAB) -> Arrays:
    """Weights as an initialisation leaves them: standard deviation 0.02, norms at 1."""
    random = np.random.default_rng(seed)
    return {
        name: (random.standard_normal(shape) * 0.02 + ("norm" in name)).astype(np.float32)
        for name, shape in shapes(vocabulary).items()
    }


def fine_tuned(base: Arrays, seed: int, scale: float = 0.001) -> Arrays:
    """``base`` moved by normal noise of this standard deviation."""
    random = np.random.default_rng(seed)
    return {
        name: (array + random.standard_normal(array.shape) * scale).astype(array.dtype) for name, array in base.items()
    }


def bf16(arrays: Arrays) -> Arrays:
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}


def save(folder: Path, arrays: Arrays, *, config: Mapping[str, Any] = CONFIG, tokens: list[str] | None = None) -> str:
    """Write a model as Hugging Face does, in one file; returns the path as text."""
    folder.mkdir()
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    if tokens is not None:
        vocabulary = {token: index for index, token in enumerate(tokens)}
        tokenizer = {"added_tokens": [], "model": {"type": "WordLevel", "vocab": vocabulary}}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(folder)

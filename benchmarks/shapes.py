"""The synthetic checkpoints: where they lie, and which tensors of which shapes a size has.

The shapes are those of published Llama models (SmolLM2-135M, TinyLlama-1.1B, Llama-3.2-3B, Llama-2-7B);
0.5B is TinyLlama cut to eight layers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

BASE = "base"
FINE_TUNES = ("code", "maths", "prose")
#: What stands for the optimizer state of each fine-tune: one non-negative number per weight.
STATISTICS = {name: f"{name}-curvature" for name in FINE_TUNES}


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a Llama ``config.json`` that decide its tensors."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the files hold, in model order."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in self._layer().items()}
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        return shapes

    def _layer(self) -> dict[str, tuple[int, ...]]:
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in bfloat16."""
        return 2 * sum(prod(shape) for shape in self.tensors().values())

    def config(self) -> dict[str, object]:
        """The Hugging Face ``config.json`` of this shape."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }


SIZES = {
    "0.1B": Shape(layers=30, hidden=576, inner=1536, heads=9, kv_heads=3, vocabulary=49152, tied=True),
    "0.5B": Shape(layers=8, hidden=2048, inner=5632, heads=32, kv_heads=4, vocabulary=32000),
    "1B": Shape(layers=22, hidden=2048, inner=5632, heads=32, kv_heads=4, vocabulary=32000),
    "3B": Shape(layers=28, hidden=3072, inner=8192, heads=24, kv_heads=8, vocabulary=128256, tied=True),
    "7B": Shape(layers=32, hidden=4096, inner=11008, heads=32, kv_heads=32, vocabulary=32000),
}


def bench_dir() -> Path:
    """Everything that a benchmark writes lies here: ``BENCH_DIR``, or ``.bench`` in the repository."""
    return Path(os.environ.get("BENCH_DIR") or Path(__file__).parents[1] / ".bench").absolute()


def model_dir(size: str, model: str) -> Path:
    return bench_dir() / "models" / size / model


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))

"""Which tensor of a GGUF architecture is which of a Hugging Face model, and how its layout differs.

The names are those that llama.cpp's converter gives; a family is what its loader calls an architecture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_ATTENTION = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}  # fmt: skip
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_DENSE = {**_ATTENTION, **_MLP, **_NORMS}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA2 = {
    **_DENSE, "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_PHI3 = {
    **_NORMS, "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_ROUTED = {**_ATTENTION, **_NORMS, "ffn_gate_inp": "mlp.gate"}
_SHARED = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}  # fmt: skip

#: Stacked experts, and what each of them is called on its own.
_QWEN_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.#.gate_proj", "ffn_up_exps": "mlp.experts.#.up_proj",
    "ffn_down_exps": "mlp.experts.#.down_proj",
}  # fmt: skip
_MIXTRAL_EXPERTS = {
    "ffn_gate_exps": "block_sparse_moe.experts.#.w1", "ffn_up_exps": "block_sparse_moe.experts.#.w3",
    "ffn_down_exps": "block_sparse_moe.experts.#.w2",
}  # fmt: skip

_GGUF = re.compile(r"(?:blk\.(\d{1,6})\.)?([a-z_]+)(?:\.(\d{1,6}))?\.(weight|bias)", re.ASCII)
_HUGGING_FACE = re.compile(r"(?:model\.layers\.(\d{1,6})\.)?(.+)\.(weight|bias)", re.ASCII)
_EXPERT = re.compile(r"\.experts\.(\d{1,6})\.", re.ASCII)


class Place(NamedTuple):
    """Where a tensor of a Hugging Face model lies in GGUF: the tensor, and the number of the expert in it."""

    name: str
    expert: int | None


@dataclass(frozen=True, eq=False)
class Family:
    """One architecture of GGUF.

    ``models``: model_type -> class, of the models it stands for; the first where a file does not tell.
    ``layer``, ``experts``: GGUF's names within a layer, and those of Hugging Face. ``permuted``: the rows of q and
    k pair up the halves that rotary embeddings rotate. ``shifted``: norms are stored with 1 added. ``constants``: what
    llama.cpp computes whatever a config says, and GGUF therefore does not hold.
    """

    architecture: str
    models: Mapping[str, str]
    layer: Mapping[str, str]
    experts: Mapping[str, str] = field(default_factory=dict)
    permuted: bool = False
    shifted: bool = False
    tied: bool = False
    constants: Mapping[str, Any] = field(default_factory=dict)

    def hugging_face(self, name: str) -> str | None:
        """The name there (``#`` for the number of an expert in a stack), or None where it has none.

        Old files have a tensor for each expert, with its number.
        """
        match = _GGUF.fullmatch(name)
        if match is None:
            return None
        layer, inner, expert, end = match.groups()
        if expert is not None:
            alone = self.experts.get(f"{inner}_exps", "").replace("#", str(int(expert)))
            return f"model.layers.{layer}.{alone}.{end}" if layer and alone else None
        if layer is None:
            return f"{_ENDS[inner]}.{end}" if inner in _ENDS else None
        found = self.layer.get(inner) or self.experts.get(inner)
        return None if found is None else f"model.layers.{layer}.{found}.{end}"

    def gguf(self, name: str) -> Place | None:
        """Where a tensor with a Hugging Face name goes, or None where the architecture has no place for it."""
        match = _HUGGING_FACE.fullmatch(name)
        if match is None:
            return None
        layer, inner, end = match.groups()
        expert = _EXPERT.search(name)
        found = self._inverse.get((layer is not None, _EXPERT.sub(".experts.#.", inner)))
        if found is None:
            return None
        prefix = "" if layer is None else f"blk.{layer}."
        return Place(f"{prefix}{found}.{end}", None if expert is None else int(expert[1]))

    @cached_property
    def _inverse(self) -> dict[tuple[bool, str], str]:
        ends = {(False, theirs): own for own, theirs in _ENDS.items() if not (self.tied and own == "output")}
        return ends | {(True, theirs): own for own, theirs in {**self.layer, **self.experts}.items()}

    def heads(self, name: str, config: Mapping[str, Any]) -> int | None:
        """How many heads share out the permuted rows of a tensor (by its GGUF name); None where none are."""
        if not self.permuted:
            return None
        key = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
        return None if key is None else config.get(key)

    def is_shifted(self, name: str) -> bool:
        return self.shifted and name.endswith("norm.weight")


_SILU = {"hidden_act": "silu"}
_GELU = {"hidden_activation": "gelu_pytorch_tanh"}

FAMILIES = {
    family.architecture: family
    for family in (
        Family(
            "llama",
            {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"},
            {**_DENSE, "ffn_gate_inp": "block_sparse_moe.gate"}, _MIXTRAL_EXPERTS, permuted=True, constants=_SILU,
        ),
        Family("qwen2", {"qwen2": "Qwen2ForCausalLM"}, _DENSE, constants=_SILU),
        Family("qwen3", {"qwen3": "Qwen3ForCausalLM"}, {**_DENSE, **_HEAD_NORMS}, constants=_SILU),
        Family(
            "qwen2moe", {"qwen2_moe": "Qwen2MoeForCausalLM"}, {**_ROUTED, **_SHARED}, _QWEN_EXPERTS,
            constants={**_SILU, "norm_topk_prob": False},
        ),
        Family(
            "qwen3moe", {"qwen3_moe": "Qwen3MoeForCausalLM"}, {**_ROUTED, **_HEAD_NORMS}, _QWEN_EXPERTS,
            constants={**_SILU, "norm_topk_prob": True},
        ),
        Family(
            "gemma", {"gemma": "GemmaForCausalLM"}, _DENSE, shifted=True, tied=True,
            constants={"hidden_act": "gelu_pytorch_tanh"},
        ),
        Family("gemma2", {"gemma2": "Gemma2ForCausalLM"}, _GEMMA2, shifted=True, tied=True, constants=_GELU),
        Family(
            "gemma3", {"gemma3_text": "Gemma3ForCausalLM"}, {**_GEMMA2, **_HEAD_NORMS}, shifted=True, tied=True,
            constants={**_GELU, "rope_local_base_freq": 10000.0},
        ),
        Family("phi3", {"phi3": "Phi3ForCausalLM"}, _PHI3, constants=_SILU),
    )
}  # fmt: skip

#: model_type -> its architecture in GGUF.
FAMILY_OF = {model: family for family in FAMILIES.values() for model in family.models}

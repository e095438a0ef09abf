"""Tiny state dicts named as in the families that people merge: real names, made-up widths."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.small_models import Arrays, save

WIDTH, TOKENS = 8, 12

_NORMS = ("norm", "Norm", "ln_", "layrnorm", "ln_f")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "token_embedding", "shared.weight", "lm_head", "embed_in",
               "embed_out", "backbone.embeddings", "proj_out", "vocab_projector")  # fmt: skip


@dataclass(frozen=True)
class Family:
    """``stacks``: container -> (layers, space-separated names inside); ``rest``: names outside of them.

    ``modules``: what its parts are called in a recipe, and how the names of each begin.
    """

    config: dict[str, Any]
    stacks: dict[str, tuple[int, str]]
    rest: str
    modules: dict[str, tuple[str, ...]] = field(default_factory=dict)
    extra: str = ""

    @property
    def names(self) -> list[str]:
        inside = [
            f"{container}.{layer}.{name}"
            for container, (count, names) in self.stacks.items()
            for layer in range(count)
            for name in names.split()
        ]
        return [*inside, *self.rest.split(), *self.extra.split()]

    def arrays(self, seed: int) -> Arrays:
        random = np.random.default_rng(seed)
        return {name: _values(name, random) for name in self.names}


def _values(name: str, random: np.random.Generator) -> Any:
    if name.endswith(("position_ids", "num_batches_tracked")):
        return np.arange(4, dtype=np.int64)
    if name.endswith(("attn.bias", "attention.bias", "masked_bias", "inv_freq")):
        return np.ones(4, np.float32)  # buffers
    return random.standard_normal(_shape(name)).astype(np.float32)


def _shape(name: str) -> tuple[int, ...]:
    if any(word in name for word in _EMBEDDINGS) and name.endswith("weight"):
        return TOKENS, WIDTH
    if "conv1d.weight" in name:
        return WIDTH, 1, 4
    if "patch_embed" in name and name.endswith("weight"):
        return WIDTH, 3, 2, 2
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return 2, WIDTH, WIDTH
    is_vector = name.endswith(("bias", "mixer.D", "class_embedding")) or any(word in name for word in _NORMS)
    return () if name == "logit_scale" else (WIDTH,) if is_vector else (WIDTH, WIDTH)


def write(folder: Path, family: Family, seed: int, **more: Any) -> str:
    return save(folder, {**family.arrays(seed), **more}, config=family.config)


LLAMA = """input_layernorm.weight self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight
    self_attn.o_proj.weight post_attention_layernorm.weight mlp.gate_proj.weight mlp.up_proj.weight
    mlp.down_proj.weight"""
TIED_REST = "model.embed_tokens.weight model.norm.weight"
LLAMA_REST = "model.embed_tokens.weight model.norm.weight lm_head.weight"
BIASED = "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias"
QWEN3 = f"{LLAMA} self_attn.q_norm.weight self_attn.k_norm.weight"
GEMMA2 = f"{LLAMA} pre_feedforward_layernorm.weight post_feedforward_layernorm.weight"
ATTENTION = """self_attn.q_proj.weight self_attn.q_proj.bias self_attn.k_proj.weight self_attn.v_proj.weight
    self_attn.v_proj.bias self_attn.out_proj.weight self_attn.out_proj.bias"""
VISION = (
    f"{ATTENTION} layer_norm1.weight layer_norm1.bias layer_norm2.weight mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight"
)
WHISPER = f"{ATTENTION} self_attn_layer_norm.weight fc1.weight fc1.bias fc2.weight final_layer_norm.weight"
BERT = """attention.self.query.weight attention.self.query.bias attention.self.key.weight attention.self.value.weight
    attention.output.dense.weight attention.output.dense.bias attention.output.LayerNorm.weight
    intermediate.dense.weight intermediate.dense.bias output.dense.weight output.LayerNorm.weight"""
BERT_REST = """bert.embeddings.word_embeddings.weight bert.embeddings.position_embeddings.weight
    bert.embeddings.token_type_embeddings.weight bert.embeddings.LayerNorm.weight"""
T5_ENCODER = """layer.0.SelfAttention.q.weight layer.0.SelfAttention.k.weight layer.0.SelfAttention.v.weight
    layer.0.SelfAttention.o.weight layer.0.layer_norm.weight layer.1.layer_norm.weight
    layer.1.DenseReluDense.wo.weight layer.1.DenseReluDense.wi.weight"""
T5_DECODER = """layer.0.SelfAttention.q.weight layer.0.SelfAttention.o.weight layer.0.layer_norm.weight
    layer.1.EncDecAttention.q.weight layer.1.EncDecAttention.k.weight layer.1.layer_norm.weight
    layer.2.DenseReluDense.wi.weight layer.2.DenseReluDense.wo.weight layer.2.layer_norm.weight"""
EXPERTS = " ".join(f"block_sparse_moe.experts.{e}.w{w}.weight" for e in (0, 1, 10) for w in (1, 2, 3))
QWEN_VISION = "norm1.weight norm2.weight attn.qkv.weight attn.qkv.bias attn.proj.weight mlp.fc1.weight mlp.fc2.weight"

FAMILIES = {
    "llama": Family({"model_type": "llama", "num_hidden_layers": 3}, {"model.layers": (3, LLAMA)}, LLAMA_REST),
    "llama, tied, old buffers": Family(
        {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": True},
        {"model.layers": (2, f"{LLAMA} self_attn.rotary_emb.inv_freq")}, "model.embed_tokens.weight model.norm.weight",
    ),
    "qwen2": Family({"num_hidden_layers": 2}, {"model.layers": (2, f"{LLAMA} {BIASED}")}, LLAMA_REST),
    "qwen3": Family({"num_hidden_layers": 2}, {"model.layers": (2, QWEN3)}, LLAMA_REST),
    "gemma2": Family({"num_hidden_layers": 2}, {"model.layers": (2, GEMMA2)}, TIED_REST),
    "phi3": Family(
        {"num_hidden_layers": 2},
        {"model.layers": (2, "self_attn.qkv_proj.weight self_attn.o_proj.weight mlp.gate_up_proj.weight "
                             "mlp.down_proj.weight input_layernorm.weight post_attention_layernorm.weight")},
        LLAMA_REST,
    ),
    "phi2": Family(
        {"num_hidden_layers": 2},
        {"model.layers": (2, "self_attn.q_proj.weight self_attn.dense.weight self_attn.dense.bias mlp.fc1.weight "
                             "mlp.fc2.weight input_layernorm.weight input_layernorm.bias")},
        "model.embed_tokens.weight model.final_layernorm.weight model.final_layernorm.bias lm_head.weight lm_head.bias",
    ),
    "gpt2": Family(
        {"n_layer": 3},
        {"h": (3, "ln_1.weight ln_1.bias attn.bias attn.c_attn.weight attn.c_attn.bias attn.c_proj.weight "
                  "ln_2.weight mlp.c_fc.weight mlp.c_fc.bias mlp.c_proj.weight")},
        "wte.weight wpe.weight ln_f.weight ln_f.bias",
    ),
    "pythia": Family(
        {"num_hidden_layers": 2},
        {"gpt_neox.layers": (2, "attention.masked_bias attention.rotary_emb.inv_freq attention.query_key_value.weight "
                                "attention.dense.weight mlp.dense_h_to_4h.weight mlp.dense_4h_to_h.weight "
                                "input_layernorm.weight input_layernorm.bias")},
        "gpt_neox.embed_in.weight gpt_neox.final_layer_norm.weight embed_out.weight",
    ),
    "mixtral": Family(
        {"num_hidden_layers": 2},
        {"model.layers": (2, "input_layernorm.weight self_attn.q_proj.weight block_sparse_moe.gate.weight " + EXPERTS)},
        LLAMA_REST,
    ),
    "mixtral, fused": Family(
        {"num_hidden_layers": 2},
        {"model.layers": (2, "input_layernorm.weight self_attn.q_proj.weight mlp.gate.weight mlp.experts.gate_up_proj "
                             "mlp.experts.down_proj")},
        LLAMA_REST,
    ),
    "mamba": Family(
        {"n_layer": 3, "num_hidden_layers": 3},
        {"backbone.layers": (3, "norm.weight mixer.A_log mixer.D mixer.conv1d.weight mixer.conv1d.bias "
                                "mixer.in_proj.weight mixer.x_proj.weight mixer.dt_proj.weight mixer.out_proj.weight")},
        "backbone.embeddings.weight backbone.norm_f.weight",
    ),
    "bert": Family(
        {"num_hidden_layers": 2}, {"bert.encoder.layer": (2, BERT)},
        f"{BERT_REST} bert.embeddings.position_ids cls.predictions.bias cls.predictions.transform.dense.weight "
        "cls.predictions.transform.LayerNorm.weight",
    ),
    "roberta": Family(
        {"num_hidden_layers": 2}, {"roberta.encoder.layer": (2, BERT)},
        BERT_REST.replace("bert.", "roberta.") + " classifier.dense.weight "
        "classifier.out_proj.weight classifier.out_proj.bias",
    ),
    "vit": Family(
        {"num_hidden_layers": 2},
        {"vit.encoder.layer": (2, "attention.attention.query.weight attention.attention.key.weight "
                                  "attention.output.dense.weight layernorm_before.weight layernorm_after.weight "
                                  "intermediate.dense.weight output.dense.weight output.dense.bias")},
        "vit.embeddings.patch_embeddings.projection.weight vit.layernorm.weight classifier.weight classifier.bias",
    ),
    "t5": Family(
        {"num_layers": 2, "num_decoder_layers": 3, "tie_word_embeddings": True},
        {"encoder.block": (2, T5_ENCODER), "decoder.block": (3, T5_DECODER)},
        "shared.weight encoder.final_layer_norm.weight decoder.final_layer_norm.weight",
        {"encoder": ("encoder.",), "decoder": ("decoder.",), "shared": ("shared.",)},
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight "
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    "whisper": Family(
        {"encoder_layers": 2, "decoder_layers": 3},
        {"model.encoder.layers": (2, WHISPER),
         "model.decoder.layers": (3, WHISPER + " encoder_attn.q_proj.weight encoder_attn_layer_norm.weight")},
        "model.encoder.conv1.weight model.encoder.embed_positions.weight model.encoder.layer_norm.weight "
        "model.decoder.embed_tokens.weight model.decoder.embed_positions.weight model.decoder.layer_norm.weight "
        "proj_out.weight",
        {"encoder": ("model.encoder.",), "decoder": ("model.decoder.",), "proj_out": ("proj_out.",)},
    ),
    "clip": Family(
        {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 3}},
        {"text_model.encoder.layers": (2, VISION), "vision_model.encoder.layers": (3, VISION)},
        "text_model.embeddings.token_embedding.weight text_model.embeddings.position_embedding.weight "
        "text_model.final_layer_norm.weight vision_model.embeddings.class_embedding "
        "vision_model.embeddings.patch_embedding.weight vision_model.pre_layrnorm.weight "
        "vision_model.post_layernorm.weight visual_projection.weight text_projection.weight logit_scale",
        {"vision_model": ("vision_model.",), "text_model": ("text_model.", "visual_projection.", "text_projection.",
                                                            "logit_scale")},
    ),
    "llava": Family(
        {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 2}},
        {"language_model.model.layers": (2, LLAMA), "vision_tower.vision_model.encoder.layers": (2, VISION)},
        "language_model.model.embed_tokens.weight language_model.model.norm.weight language_model.lm_head.weight "
        "multi_modal_projector.linear_1.weight multi_modal_projector.linear_2.bias "
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        {"text_decoder": ("language_model.",), "vision_tower": ("vision_tower.",),
         "multi_modal_projector": ("multi_modal_projector.",)},
    ),
    "qwen2-vl": Family(
        {"num_hidden_layers": 2, "vision_config": {"depth": 3}},
        {"model.layers": (2, f"{LLAMA} {BIASED}"), "visual.blocks": (3, QWEN_VISION)},
        f"{LLAMA_REST} visual.patch_embed.proj.weight visual.merger.mlp.0.weight visual.merger.ln_q.weight",
        {"text_decoder": ("model.", "lm_head."), "visual": ("visual.",)},
    ),
    "qwen2.5-vl": Family(
        {"text_config": {"num_hidden_layers": 2}, "vision_config": {"depth": 3}},
        {"model.language_model.layers": (2, f"{LLAMA} {BIASED}"), "model.visual.blocks": (3, QWEN_VISION)},
        "model.language_model.embed_tokens.weight model.language_model.norm.weight lm_head.weight "
        "model.visual.patch_embed.proj.weight model.visual.merger.mlp.0.weight",
        {"language_model": ("model.language_model.", "lm_head."), "vision_tower": ("model.visual.",)},
    ),
    "gemma3": Family(
        {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 2}},
        {"model.language_model.layers": (2, GEMMA2), "model.vision_tower.vision_model.encoder.layers": (2, VISION)},
        "model.language_model.embed_tokens.weight model.language_model.norm.weight "
        "model.multi_modal_projector.mm_input_projection_weight model.vision_tower.vision_model.post_layernorm.weight",
        {"text_decoder": ("model.language_model.",), "vision_tower": ("model.vision_tower.",),
         "projector": ("model.multi_modal_projector.",)},
    ),
}  # fmt: skip

"""What a tensor does, from its name alone: ordered rules, the first that matches wins.

A name that no rule knows has the role "other": it is merged like any weight, and methods that need to know
more can say so. A bias has the role of its weight.
"""

from __future__ import annotations

import re
from collections.abc import Container

#: (role, pattern). Patterns see the name without ".weight" and ".bias" and are tried in this order; "{}" in
#: a role is filled with the word of ``_PARTS`` for what the pattern's group caught.
_RULES: tuple[tuple[str, str], ...] = (
    ("buffer", r"(inv_freq|\w+_ids|masked_bias|num_batches_tracked|\w+_cached|relative_position_index|attn_mask)$"),
    ("position", r"(wpe|\w*position\w*_?embed\w*|embed_positions|\w*pos_emb\w*|positional_embedding|relative_attention_bias|relative_position_bias_table)$"),
    ("input", r"(token_type_embeddings|\w*patch_embed\w*(\.proj\w*)?|\w*(cls|mask|class|distillation|register)_?(token|embedding)s?)$"),
    ("norm", r"(ln|bn)(_?[a-z0-9]+)?$|norm\w*$|running_(mean|var)$"),
    ("head.task", r"(^|\.)(classifier|score|qa_outputs|pooler|pre_classifier|seq_relationship|text_projection|visual_projection|logit_scale|logit_bias)(\.\w+)*$"),
    ("head", r"(^|\.)(lm_head(\.decoder)?|embed_out|cls\.predictions(\.decoder)?|vocab_projector)$|^(transformer\.)?(output|output_layer|proj_out)$"),
    ("head.transform", r"(^|\.)(lm_head\.\w+|cls\.predictions\.transform\.\w+|vocab_transform)$"),
    ("embedding", r"(^|\.)(embed_tokens\w*|wte|word_embeddings?|tok_embeddings|token_embeddings?|embed_in|shared|embedding|embeddings|tokens_embed)$"),
    ("router", r"(shared_expert_gate|(mlp|moe|feed_forward|ffn)\.(gate|router(\.\w+)?)|router(\.(layer|classifier|gate))?|gate\.wg)(\.e_score_correction_bias)?$"),
    ("shared_expert.{}", r"shared_(?:experts?|mlp)\.(?:\w+\.)*(\w+)$"),
    ("expert.{}", r"experts?\.(?:\w+\.)*(\w+)$"),
    ("attention.{}", r"(?:att\w*|self|EncDecAttention|mha)\.(?:self\.|attention\.)?(q|k|v|o|q_a|q_b|kv_a|kv_b|qkv)(?:_proj\w*)?$"),
    ("attention.{}", r"(?:att\w*|self|mha)\.(?:self\.|attention\.|output\.)*(\w+?)(?:\.0)?$"),
    ("ssm.{}", r"(?:mixer|mamba|ssm)\w*\.(in_proj|x_proj|dt_proj|dt_bias|out_proj|conv1d|A_log|A|D)$"),
    ("mlp.{}", r"(?:mlp|ffn|feed_forward|ff|DenseReluDense|intermediate|output|layers?\.\d+|blocks?\.\d+|h\.\d+|layer)\.(\w+)$"),
)  # fmt: skip

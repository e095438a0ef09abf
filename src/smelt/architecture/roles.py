"""What a tensor does, from its name alone.

Two steps: rules for whole names, in order (the first that matches wins), then the block that the tensor is
in (attention, expert, ...) and the part that it plays there. A name that neither knows has the role
"other": nothing is guessed. A bias has the role of its weight.

Roles: buffer, position, input (what feeds the first layer beside words), norm, embedding, head, head.transform,
head.task, router, router.shared, attention.{q,k,v,o,qkv,kv,q_a,q_b,kv_a,kv_b}, mlp.{gate,up,down,gate_up},
expert.{...} and shared_expert.{...} with the parts of an mlp, ssm.{in,out,x,dt,conv,a,d}, other.
"""

from __future__ import annotations

import re
from collections.abc import Container
from functools import lru_cache

#: No family has longer names; the time that a pattern takes grows with the square of the length.
_LONGEST = 256

#: Layers and experts differ by their number only, so that one answer serves all. A number right before the
#: last part may stand for a module, and is kept.
_INNER_INDEX = re.compile(r"\.\d+(?=\.[^.]+\.)")

_SUFFIX = re.compile(r"\.(weight|bias|gamma|beta)$|(?<=proj)_(weight|bias)$")


def _ending(*patterns: str) -> re.Pattern[str]:
    """Matches names whose last parts are one of ``patterns``."""
    return re.compile(rf"(?:^|\.)(?:{'|'.join(patterns)})$")


_RULES = (
    ("buffer", _ending(r"inv_freq", r"\w+_ids", r"masked_bias", r"num_batches_tracked", r"\w+_cached", r"attn_mask",
                       r"relative_position_index")),
    ("norm", _ending(r"[lb]n(_?[a-z0-9]{1,5})?", r"\w*([nN]orm|layrnorm)\w*", r"running_(mean|var)")),
    ("router.shared", _ending(r"shared_expert_gate")),
    ("router", _ending(r"(\w*moe|mlp|ffn|feed_forward)\.gate(\.\w+)?", r"router(\.\w+)*",
                       r"e_score_correction_bias")),
    ("position", _ending(r"wpe", r"\w*position\w*embed\w*", r"embed_positions", r"\w*pos_emb\w*",
                         r"relative_attention_bias", r"relative_position_bias_table")),
    ("input", _ending(r"token_type_embeddings", r"\w*patch_embed\w*(\.proj\w*)?", r"encoder\.conv[12]",
                      r"visual\.conv1", r"(cls|mask|class|distillation|dist|register)_(tokens?|embedding)")),
    ("head.task", _ending(r"(pre_)?classifier(\.\w+)*", r"score", r"qa_outputs", r"pooler(\.\w+)*", r"seq_relationship",
                          r"(text|visual)_projection", r"logit_(scale|bias)")),
    ("head", _ending(r"lm_head(\.decoder)?", r"embed_out", r"cls\.predictions(\.decoder)?", r"vocab_projector")),
    ("head", re.compile(r"^((\w+\.)?(output|output_layer|output_projection|proj_out)|decoder)$")),
    ("head.transform", _ending(r"lm_head\.\w+", r"cls\.predictions(\.\w+)+", r"vocab_transform")),
    ("embedding", _ending(r"embed_tokens\w*", r"wte", r"word_embeddings?", r"tok(ens?)?_embed(dings?)?",
                          r"embed_in", r"shared", r"embeddings?")),
)  # fmt: skip


def _table(**words: str) -> dict[str, str]:
    """word -> part, from part="word word ..."."""
    return {word: part for part, listed in words.items() for word in listed.split()}


_ATTENTION = _table(
    q="q q_proj query wq q_lin to_q",
    k="k k_proj key wk k_lin to_k",
    v="v v_proj value wv v_lin to_v",
    o="o o_proj out_proj out_lin to_out out wo Wo c_proj dense proj",
    qkv="qkv qkv_proj query_key_value c_attn Wqkv wqkv in_proj W_pack",
    kv="kv kv_proj key_value",
    q_a="q_a_proj",
    q_b="q_b_proj",
    kv_a="kv_a_proj kv_a_proj_with_mqa",
    kv_b="kv_b_proj",
)
_MLP = _table(
    gate="gate_proj w1 wi_0 c_fc_0",
    up="up_proj w3 v1 wi wi_1 c_fc c_fc_1 fc1 fc_in lin1 dense_h_to_4h",
    down="down_proj w2 wo Wo c_proj fc2 fc_out lin2 dense_4h_to_h output_linear",
    gate_up="gate_up_proj Wi input_linear",
)
_SSM = _table(
    a="A A_log",
    d="D",
    x="x_proj",
    dt="dt_proj dt_bias",
    out="out_proj",
    conv="conv1d",
    **{"in": "in_proj in_proj_qkvz in_proj_ba in_proj_qkv in_proj_z in_proj_a in_proj_b"},
)

#: The block, by what the path to the tensor contains, and the parts that may play in it; innermost first.
_BLOCKS = (
    (re.compile(r"\bshared_(experts?|mlp)\b"), (("shared_expert", _MLP),)),
    (re.compile(r"experts?\b|\bblock_sparse_moe\b"), (("expert", _MLP),)),
    (re.compile(r"\b(\w*mixer|mamba|ssm|linear_attn)\b"), (("ssm", _SSM), ("attention", _ATTENTION), ("mlp", _MLP))),
    (re.compile(r"attn|attention|\b(att|mha)\b", re.IGNORECASE), (("attention", _ATTENTION),)),
    (re.compile(r"\bintermediate$"), (("mlp", {"dense": "up"}),)),
    (re.compile(r"\boutput$"), (("mlp", {"dense": "down"}),)),
    (re.compile(r"\b(mlp|ffn?|feed_forward|DenseReluDense|\d+)$"), (("mlp", _MLP),)),
)


def role_of(name: str, stored: Container[str] = ()) -> str:
    """The role of the tensor ``name``.

    ``stored`` are the names beside it: ``attn.bias`` is a causal mask (a buffer) where there is no
    ``attn.weight``, and a bias otherwise.
    """
    if re.search(r"(^|\.)(attn|attention)\.bias$", name) and name.removesuffix("bias") + "weight" not in stored:
        return "buffer"
    return "other" if len(name) > _LONGEST else _role(_INNER_INDEX.sub(".0", name))


@lru_cache(maxsize=1 << 14)
def _role(name: str) -> str:
    path = _SUFFIX.sub("", name)
    by_name = next((role for role, pattern in _RULES if pattern.search(path)), None)
    return by_name or _part_of_block(path) or "other"


def _part_of_block(path: str) -> str | None:
    """The role by block and last word: ".0" behind it (an unnamed sequence) does not count."""
    parents, _, word = path.removesuffix(".0").rpartition(".")
    for place, choices in _BLOCKS:
        if place.search(parents):
            return next((f"{block}.{parts[word]}" for block, parts in choices if word in parts), None)
    return None

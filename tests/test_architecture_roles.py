"""What is concluded about single tensors and configs: roles, vocabulary, ties, facts, names without a prefix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelt.architecture import Structure, aligned, comparable_facts, role_of

STORED = json.loads((Path(__file__).parent / "data" / "architectures.json").read_text())

LAYERS = [f"model.layers.{i}.{part}.weight" for i in range(4) for part in ("self_attn.q_proj", "mlp.up_proj")]
LLAMA = ["model.embed_tokens.weight", *LAYERS, "model.norm.weight", "lm_head.weight"]


def stored(family: str) -> Structure:
    return Structure.of(STORED[family]["tensors"], STORED[family]["config"])


# --- roles ----------------------------------------------------------------------------------------------

ROLES = [
    ("model.layers.0.self_attn.q_proj.bias", "attention.q"),
    ("model.layers.0.self_attn.qkv_proj.weight", "attention.qkv"),
    ("model.layers.0.mlp.gate_up_proj.weight", "mlp.gate_up"),
    ("model.layers.0.mlp.gate.weight", "router"),
    ("model.layers.0.block_sparse_moe.gate.weight", "router"),
    ("model.layers.0.mlp.router.bias", "router"),
    ("model.layers.0.mlp.shared_expert_gate.weight", "router.shared"),
    ("model.layers.0.mlp.shared_expert.down_proj.weight", "shared_expert.down"),
    ("model.layers.0.mlp.experts.3.up_proj.weight", "expert.up"),
    ("model.layers.0.block_sparse_moe.experts.3.w2.weight", "expert.down"),
    ("model.layers.0.mlp.experts.gate_up_proj", "expert.gate_up"),
    ("model.layers.0.mlp.experts.gate_up_proj_bias", "expert.gate_up"),
    ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "attention.kv_a"),
    ("model.layers.0.self_attn.q_norm.weight", "norm"),
    ("model.layers.0.self_attn.rotary_emb.inv_freq", "buffer"),
    ("model.layers.0.feed_forward.w1.weight", "mlp.gate"),
    ("layers.0.attention.wo.weight", "attention.o"),
    ("transformer.h.0.attn.bias", "buffer"),
    ("transformer.h.0.attn.masked_bias", "buffer"),
    ("transformer.h.0.attn.c_attn.bias", "attention.qkv"),
    ("transformer.h.0.mlp.c_proj.weight", "mlp.down"),
    ("bert.encoder.layer.0.attention.output.dense.weight", "attention.o"),
    ("bert.encoder.layer.0.output.dense.weight", "mlp.down"),
    ("bert.encoder.layer.0.intermediate.dense.weight", "mlp.up"),
    ("bert.encoder.layer.0.output.LayerNorm.gamma", "norm"),
    ("bert.embeddings.position_ids", "buffer"),
    ("bert.pooler.dense.weight", "head.task"),
    ("cls.predictions.transform.dense.weight", "head.transform"),
    ("cls.predictions.decoder.weight", "head"),
    ("lm_head.dense.weight", "head.transform"),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "position"),
    ("decoder.block.0.layer.1.EncDecAttention.q.weight", "attention.q"),
    ("encoder.block.0.layer.1.DenseReluDense.wi_1.weight", "mlp.up"),
    ("shared.weight", "embedding"),
    ("output.weight", "head"),
    ("transformer.resblocks.0.attn.in_proj_weight", "attention.qkv"),
    ("blocks.0.attn.proj.weight", "attention.o"),
    ("patch_embed.proj.weight", "input"),
    ("cls_token", "input"),
    ("pos_embed", "position"),
    ("backbone.layers.0.mixer.dt_bias", "ssm.dt"),
    ("model.layers.0.linear_attn.in_proj_qkvz.weight", "ssm.in"),
    ("backbone.layers.0.mixer.q_proj.weight", "attention.q"),
    ("layer1.0.bn1.running_mean", "norm"),
    ("layer1.0.bn1.num_batches_tracked", "buffer"),
    ("layer1.0.conv1.weight", "other"),
    ("model.layers.0.self_attn.sinks", "other"),
    ("model.layers.0.self_attn.q_proj.lora_A.weight", "other"),
    ("", "other"),
    ("...", "other"),
]


@pytest.mark.parametrize(("name", "role"), ROLES)
def test_roles(name: str, role: str) -> None:
    assert role_of(name) == role


@given(st.sampled_from(ROLES), st.integers(0, 99_999))
def test_roles_do_not_depend_on_the_layer(case: tuple[str, str], layer: int) -> None:
    name, role = case
    assert role_of(name.replace(".0.", f".{layer}.", 1)) == role


@given(st.text(st.sampled_from("ab._position_embed_norm0"), max_size=5000))
def test_any_name_has_a_role(name: str) -> None:
    assert role_of(name)


def test_overlong_names_are_not_looked_into() -> None:
    assert role_of("position_embed" * 300) == "other"


# --- config ---------------------------------------------------------------------------------------------


def test_lists_with_one_entry_per_layer() -> None:
    config = {
        "num_hidden_layers": 4, "layer_types": ["a", "b", "a", "b"], "num_kv_heads_per_layer": [1, 2, 3, 4],
        "eos_token_id": [1, 2, 3, 4], "architectures": ["x", "y", "z", "u"], "mlp_only_layers": [0, 1, 2, 3],
        "no_rope_layers": [1, 1, 1], "moe_layer_freq": [0, 1, 1, 1], "decoder_sparse_step": 2, "max_window_layers": 0,
    }  # fmt: skip
    structure = Structure.of(LLAMA, config)
    (stack,) = structure.stacks
    lists = structure.lists_of(stack)
    assert set(lists) == {("layer_types",), ("num_kv_heads_per_layer",), ("moe_layer_freq",)}
    assert lists["layer_types",] == ["a", "b", "a", "b"]
    assert structure.patterns_of(stack) == {("mlp_only_layers",): [0, 1, 2, 3], ("decoder_sparse_step",): 2}


def test_nested_configs_are_looked_into() -> None:
    config = {"text_config": {"num_hidden_layers": 4, "layer_types": list("abab")}, "layer_types": list("abab")}
    structure = Structure.of(LLAMA, config)
    assert structure.layer_count_key == ("text_config", "num_hidden_layers")
    assert set(structure.lists_of(structure.stacks[0])) == {("text_config", "layer_types")}


def test_facts_have_one_name_whatever_the_family() -> None:
    gpt2, llama = comparable_facts(STORED["gpt2"]["config"]), comparable_facts(STORED["llama"]["config"])
    assert (gpt2["hidden_size"], gpt2["attention_heads"], gpt2["head_dim"]) == (16, 2, 8)
    assert (llama["hidden_size"], llama["attention_heads"], llama["key_value_heads"]) == (32, 4, 2)
    assert llama["quantised"] is False
    assert comparable_facts({"quantization_config": {"quant_method": "awq"}})["quantised"] is True
    assert comparable_facts(STORED["clip"]["config"])["vision_config.hidden_size"] == 24
    assert comparable_facts({}) == {}


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
        ),
        ({"hidden_size": 8, "num_attention_heads": 2}, {"hidden_size": 8, "num_attention_heads": 2, "head_dim": 4}),
    ],
)
def test_older_and_newer_spellings_state_the_same_facts(older: dict[str, Any], newer: dict[str, Any]) -> None:
    assert comparable_facts(older) == comparable_facts(newer)
    assert comparable_facts({**older, "rope_theta": 3.0}) != comparable_facts(newer)


# --- vocabulary and ties --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"model.embed_tokens.weight", "lm_head.weight"}),
        ("bert", {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"}),
        ("gpt2", {"transformer.wte.weight"}),
        ("clip", {"text_model.embeddings.token_embedding.weight"}),
        ("t5", {"shared.weight"}),
        ("vit", set()),
    ],
)
def test_tensors_with_a_vocabulary_axis(name: str, expected: set[str]) -> None:
    structure = stored(name)
    axes = {role.name: structure.vocabulary_axis(role.name) for role in structure}
    assert {name for name, axis in axes.items() if axis is not None} == expected
    assert {axis for axis in axes.values() if axis is not None} <= {0}


def test_the_vocabulary_axis_may_be_the_second() -> None:
    structure = Structure.of({"wte.weight": (96, 16), "lm_head.weight": (16, 96)}, {"vocab_size": 96})
    assert structure.vocabulary_axis("lm_head.weight") == 1
    assert structure.vocabulary_axis("absent") is None


def test_an_absent_head_is_lent_by_the_embedding() -> None:
    tied, explicit = stored("llama_tied"), stored("llama_tied_head")
    assert tied.heads == ()
    assert tied.tied_groups == ()
    assert tied.tied_source("lm_head.weight") == "model.embed_tokens.weight"
    assert tied.tied_source("lm_head.bias") is None
    assert tied.tied_source("model.norm.weight") is None
    assert explicit.tied_source("lm_head.weight") is None
    assert explicit.tied_groups == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert stored("t5").tied_source("decoder.embed_tokens.weight") == "shared.weight"


def test_nothing_is_lent_where_the_config_says_untied() -> None:
    names = [name for name in LLAMA if name != "lm_head.weight"]
    assert Structure.of(names, {"tie_word_embeddings": False}).tied_source("lm_head.weight") is None
    assert Structure.of(names, {}).tied_source("lm_head.weight") == "model.embed_tokens.weight"
    assert stored("llama").tied_groups == ()


# --- two ways of naming ---------------------------------------------------------------------------------


def test_names_that_differ_by_a_prefix_are_matched() -> None:
    long, short = list(STORED["gpt2"]["tensors"]), list(STORED["gpt2_noprefix"]["tensors"])
    there, back = aligned(short, long), aligned(long, short)
    assert there is not None
    assert back is not None
    assert set(there.values()) == set(long)
    assert all(there[back[name]] == name for name in long)


def test_shared_names_stand_for_themselves() -> None:
    short = [name.removeprefix("model.") for name in LLAMA]
    found = aligned(short, LLAMA)
    assert found is not None
    assert found["lm_head.weight"] == "lm_head.weight"
    assert found["norm.weight"] == "model.norm.weight"
    assert aligned(LLAMA, LLAMA) == {name: name for name in LLAMA}


def test_names_that_no_prefix_explains_are_not_matched() -> None:
    assert aligned(["a.x", "b.y"], ["p.a.x", "q.b.y"]) is None
    assert aligned(["a.x", "b.y"], ["p.a.x", "p.b.z"]) is None
    assert aligned(["x"], []) is None
    assert aligned([], ["x"]) == {}


@given(st.sets(st.text(st.sampled_from("ab.x"), min_size=1, max_size=6), min_size=1), st.sampled_from(["m.", "a.b."]))
def test_a_prefix_is_always_found(names: set[str], prefix: str) -> None:
    longer = {prefix + name for name in names}
    assert longer & names or aligned(names, longer) == {name: prefix + name for name in names}

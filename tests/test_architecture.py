"""What is concluded from tensor names and config.json: layers, roles, vocabulary, ties."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelt.architecture import Structure, comparable_facts

Shapes = dict[str, tuple[int, ...]]

STORED = json.loads((Path(__file__).parent / "data" / "architectures.json").read_text())


def stored(family: str) -> Structure:
    return Structure.of(STORED[family]["tensors"], STORED[family]["config"])


def layers(prefix: str, count: int, inside: str, *, first: int = 0) -> list[str]:
    """Names of ``count`` layers, each with the space-separated names ``inside``."""
    return [f"{prefix}.{layer}.{name}" for layer in range(first, first + count) for name in inside.split()]


LLAMA_LAYER = """input_layernorm.weight self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight
    self_attn.o_proj.weight post_attention_layernorm.weight mlp.gate_proj.weight mlp.up_proj.weight
    mlp.down_proj.weight"""
LLAMA = ["model.embed_tokens.weight", *layers("model.layers", 4, LLAMA_LAYER), "model.norm.weight", "lm_head.weight"]

WHISPER_ENCODER = """self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight self_attn.out_proj.weight
    self_attn_layer_norm.weight fc1.weight fc2.weight final_layer_norm.weight"""

DEEPSEEK_ATTENTION = """self_attn.q_a_proj.weight self_attn.q_a_layernorm.weight self_attn.q_b_proj.weight
    self_attn.kv_a_proj_with_mqa.weight self_attn.kv_b_proj.weight self_attn.o_proj.weight input_layernorm.weight"""
DEEPSEEK_MOE = """mlp.gate.weight mlp.gate.e_score_correction_bias mlp.shared_experts.up_proj.weight
    mlp.experts.0.gate_proj.weight mlp.experts.1.gate_proj.weight mlp.experts.10.down_proj.weight"""

#: family -> (names, config, {prefix: layers}).
FAMILIES: dict[str, tuple[list[str], dict[str, Any], dict[str, int]]] = {
    "llama": (LLAMA, {"num_hidden_layers": 4}, {"model.layers": 4}),
    "falcon": (
        [
            "transformer.word_embeddings.weight", "transformer.ln_f.weight", "lm_head.weight",
            *layers("transformer.h", 3, "self_attention.query_key_value.weight self_attention.dense.weight "
                    "mlp.dense_h_to_4h.weight mlp.dense_4h_to_h.weight ln_attn.weight ln_mlp.bias"),
        ],
        {"num_hidden_layers": 3},
        {"transformer.h": 3},
    ),
    "mpt": (
        [
            "transformer.wte.weight", "transformer.norm_f.weight",
            *layers("transformer.blocks", 2, "norm_1.weight attn.Wqkv.weight attn.out_proj.weight ffn.up_proj.weight"),
        ],
        {"n_layers": 2},
        {"transformer.blocks": 2},
    ),
    "gpt_neox": (
        [
            "gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm.weight", "embed_out.weight",
            *layers("gpt_neox.layers", 6, "attention.bias attention.masked_bias attention.rotary_emb.inv_freq "
                    "attention.query_key_value.weight attention.dense.bias mlp.dense_h_to_4h.weight"),
        ],
        {"num_hidden_layers": 6},
        {"gpt_neox.layers": 6},
    ),
    "mamba": (
        [
            "backbone.embeddings.weight", "backbone.norm_f.weight",
            *layers("backbone.layers", 5, "norm.weight mixer.A_log mixer.D mixer.conv1d.weight mixer.conv1d.bias "
                    "mixer.in_proj.weight mixer.x_proj.weight mixer.dt_proj.weight mixer.out_proj.weight"),
        ],
        {"n_layer": 5, "num_hidden_layers": 5},
        {"backbone.layers": 5},
    ),
    "distilbert": (
        [
            "distilbert.embeddings.word_embeddings.weight", "distilbert.embeddings.LayerNorm.bias",
            "vocab_projector.bias",
            *layers("distilbert.transformer.layer", 3, "attention.q_lin.weight attention.out_lin.weight "
                    "sa_layer_norm.weight ffn.lin1.weight ffn.lin2.bias output_layer_norm.weight"),
        ],
        {"n_layers": 3},
        {"distilbert.transformer.layer": 3},
    ),
    "whisper": (
        [
            "model.encoder.conv1.weight", "model.encoder.embed_positions.weight", "model.encoder.layer_norm.weight",
            "model.decoder.embed_tokens.weight", "model.decoder.layer_norm.weight", "proj_out.weight",
            *layers("model.encoder.layers", 2, WHISPER_ENCODER),
            *layers("model.decoder.layers", 2, WHISPER_ENCODER + " encoder_attn.q_proj.weight"),
        ],
        {"encoder_layers": 2, "decoder_layers": 2, "num_hidden_layers": 2},
        {"model.decoder.layers": 2, "model.encoder.layers": 2},
    ),
    "deepseek with a prediction layer": (
        [
            "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
            *layers("model.layers", 1, DEEPSEEK_ATTENTION + " mlp.gate_proj.weight"),
            *layers("model.layers", 4, DEEPSEEK_ATTENTION + " " + DEEPSEEK_MOE, first=1),
        ],
        {"num_hidden_layers": 4, "num_nextn_predict_layers": 1, "first_k_dense_replace": 1},
        {"model.layers": 4},
    ),
    "vision and language": (
        [
            "language_model.model.embed_tokens.weight", "language_model.lm_head.weight",
            "multi_modal_projector.0.weight", "multi_modal_projector.1.weight",
            "vision_tower.vision_model.embeddings.patch_embedding.weight",
            *layers("language_model.model.layers", 4, LLAMA_LAYER),
            *layers("vision_tower.vision_model.encoder.layers", 4, WHISPER_ENCODER),
        ],
        {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 4}},
        {"language_model.model.layers": 4, "vision_tower.vision_model.encoder.layers": 4},
    ),
}  # fmt: skip


def family(name: str) -> Structure:
    names, config, _ = FAMILIES[name]
    return Structure.of(names, config)


def roles(structure: Structure, *, strip: str = "") -> dict[str, str]:
    """Name -> role of what lies under ``strip``."""
    return {role.name.removeprefix(strip): role.role for role in structure if role.name.startswith(strip)}


# --- stacks and depth -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_stacks_of_families(name: str) -> None:
    structure, expected = family(name), FAMILIES[name][2]
    assert {stack.prefix: stack.count for stack in structure.stacks} == expected
    assert structure.remarks == ()
    assert all(role.role != "other" for role in structure if role.kind in ("layer", "post"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", {"bert.encoder.layer": 2}),
        ("clip", {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 3}),
        ("gpt2", {"transformer.h": 2}),
        ("gpt2_noprefix", {"h": 2}),
        ("llama", {"model.layers": 4}),
        ("mixtral", {"model.layers": 2}),
        ("qwen2", {"model.layers": 3}),
        ("roberta", {"roberta.encoder.layer": 2}),
        ("t5", {"decoder.block": 3, "encoder.block": 2}),
        ("vit", {"vit.encoder.layer": 3}),
    ],
)
def test_stacks_of_stored_models(name: str, expected: dict[str, int]) -> None:
    structure = stored(name)
    assert {stack.prefix: stack.count for stack in structure.stacks} == expected
    assert structure.remarks == ()
    assert [role.name for role in structure if role.role == "other"] == []


@pytest.mark.parametrize(
    ("name", "prefix", "keys"),
    [
        ("mamba", "backbone.layers", [("n_layer",), ("num_hidden_layers",)]),
        ("whisper", "model.encoder.layers", [("encoder_layers",)]),
        ("whisper", "model.decoder.layers", [("decoder_layers",)]),
        ("vision and language", "language_model.model.layers", [("text_config", "num_hidden_layers")]),
        ("vision and language", "vision_tower.vision_model.encoder.layers", [("vision_config", "num_hidden_layers")]),
    ],
)
def test_where_the_number_of_layers_is_stated(name: str, prefix: str, keys: list[tuple[str, ...]]) -> None:
    (stack,) = [stack for stack in family(name).stacks if stack.prefix == prefix]
    assert list(stack.count_keys) == keys


def test_an_ambiguous_count_is_said_not_guessed() -> None:
    config = {"a_config": {"num_hidden_layers": 4}, "b_config": {"num_hidden_layers": 4}}
    structure = Structure.of(LLAMA, config)
    assert structure.main_stack is not None
    assert structure.main_stack.count_keys == ()
    assert structure.layer_count_key is None
    assert structure.lists_of(structure.main_stack) == {}
    assert structure.remarks == ("model.layers: config.json does not tell which key counts its layers",)


def test_the_main_stack_is_the_only_one() -> None:
    assert family("llama").main_stack == family("llama").stacks[0]
    assert family("llama").layer_count_key == ("num_hidden_layers",)
    assert family("whisper").main_stack is None
    assert family("whisper").layer_count_key is None
    assert Structure.of(["a.weight"]).main_stack is None


@pytest.mark.parametrize("count", [3, 5])
def test_layers_that_the_config_does_not_count_are_said(count: int) -> None:
    structure = Structure.of(LLAMA, {"num_hidden_layers": count})
    assert structure.stacks == ()
    (remark,) = structure.remarks
    assert remark.startswith(
        f"model.layers holds 4 numbered blocks (0 to 3), config.json says num_hidden_layers = {count}"
    )
    assert {role.kind for role in structure} == {"loose"}


def test_a_missing_layer_is_said() -> None:
    names = [name for name in LLAMA if ".layers.2." not in name]
    (remark,) = Structure.of(names, {"num_hidden_layers": 3}).remarks
    assert "model.layers holds 3 numbered blocks (0 to 3)" in remark


def test_single_modules_in_a_row_are_no_layers() -> None:
    names = [*LLAMA, *(f"projector.{i}.weight" for i in range(4)), *(f"head.layers.{i}.weight" for i in range(4))]
    structure = Structure.of(names, {"num_hidden_layers": 4})
    assert [stack.prefix for stack in structure.stacks] == ["model.layers"]
    assert structure.remarks == ()


def test_stages_of_different_width_are_no_layers() -> None:
    shapes: Shapes = {f"encoder.layers.{i}.blocks.0.norm.weight": (2**i,) for i in range(4)}
    assert Structure.of(shapes, {"num_layers": 4}).stacks == ()
    assert Structure.of(list(shapes), {"num_layers": 4}).stacks != ()


def test_depth_runs_from_0_to_1() -> None:
    structure = stored("qwen2")
    assert {role.layer: role.depth for role in structure if role.kind == "layer"} == {0: 0.0, 1: 0.5, 2: 1.0}
    assert {role.depth for role in structure if role.kind != "layer"} == {None}
    single = Structure.of(layers("h", 1, "mlp.c_fc.weight"), {"n_layer": 1})
    assert [role.depth for role in single] == [1.0]


def test_layers_follow_numbers_not_text() -> None:
    structure = Structure.of(layers("h", 12, "mlp.c_fc.weight"), {"n_layer": 12})
    assert structure["h.10.mlp.c_fc.weight"].depth == 10 / 11
    assert structure["h.2.mlp.c_fc.weight"].depth == 2 / 11


def test_prediction_layers_behind_the_stack_are_loose() -> None:
    structure = family("deepseek with a prediction layer")
    assert structure["model.layers.4.self_attn.o_proj.weight"].kind == "loose"
    assert structure["model.layers.3.self_attn.o_proj.weight"].depth == 1.0


def test_before_and_after_the_layers() -> None:
    def outside(structure: Structure, kind: str) -> set[str]:
        return {role.name for role in structure if role.kind == kind}

    assert outside(family("llama"), "pre") == {"model.embed_tokens.weight"}
    assert outside(family("llama"), "post") == {"model.norm.weight", "lm_head.weight"}
    assert "bert.embeddings.LayerNorm.weight" in outside(stored("bert"), "pre")
    assert all(name.startswith("cls.") for name in outside(stored("bert"), "post"))
    assert "vision_model.pre_layrnorm.weight" in outside(stored("clip"), "pre")
    assert "vision_model.post_layernorm.weight" in outside(stored("clip"), "post")
    assert outside(stored("vit"), "post") == {
        "vit.layernorm.weight", "vit.layernorm.bias", "classifier.weight", "classifier.bias"
    }  # fmt: skip
    assert outside(stored("gpt2_noprefix"), "pre") == {"wte.weight", "wpe.weight"}


# --- experts and biases ---------------------------------------------------------------------------------


def test_a_bias_has_the_role_of_its_weight() -> None:
    for structure in (stored(name) for name in STORED):
        for role in structure:
            weight = structure.get(role.name.removesuffix("bias") + "weight")
            assert weight is None or not role.name.endswith(".bias") or weight.role == role.role


def test_a_mask_is_told_from_a_bias_by_the_weight_beside_it() -> None:
    bias = "blocks.0.attn.bias"
    assert Structure.of([bias])[bias].role == "buffer"
    assert Structure.of([bias, "blocks.0.attn.weight"])[bias].role == "other"


def test_experts_are_numbered() -> None:
    structure = family("deepseek with a prediction layer")
    assert {role.expert for role in structure} == {None, 0, 1, 10}
    assert structure["model.layers.1.mlp.experts.10.down_proj.weight"].expert == 10
    assert structure["model.layers.1.mlp.experts.10.down_proj.weight"].layer == 1
    assert structure["model.layers.1.mlp.shared_experts.up_proj.weight"].expert is None
    assert {role.expert for role in stored("mixtral") if role.role.startswith("expert.")} == {0, 1, 2, 3}


def test_roles_of_a_whole_layer() -> None:
    assert roles(stored("llama"), strip="model.layers.3.") == {
        "input_layernorm.weight": "norm", "post_attention_layernorm.weight": "norm",
        "self_attn.q_proj.weight": "attention.q", "self_attn.k_proj.weight": "attention.k",
        "self_attn.v_proj.weight": "attention.v", "self_attn.o_proj.weight": "attention.o",
        "mlp.gate_proj.weight": "mlp.gate", "mlp.up_proj.weight": "mlp.up", "mlp.down_proj.weight": "mlp.down",
    }  # fmt: skip


# --- laws -----------------------------------------------------------------------------------------------

flat_names = st.sets(st.text(st.sampled_from("ab.01_h"), max_size=12), max_size=20)


@given(flat_names)
def test_names_that_no_config_explains_are_loose(names: set[str]) -> None:
    structure = Structure.of(names)
    assert structure.stacks == ()
    assert structure.main_stack is None
    assert [role.name for role in structure] == sorted(names)
    assert {role.kind for role in structure} <= {"loose"}
    assert all(structure.rename_layer(name, 7) == name for name in names)


@given(st.sampled_from(sorted(STORED)), st.randoms(use_true_random=False))
def test_the_order_of_names_does_not_matter(name: str, rng: random.Random) -> None:
    shapes = list(STORED[name]["tensors"].items())
    rng.shuffle(shapes)
    shuffled, sorted_ = Structure.of(dict(shapes), STORED[name]["config"]), stored(name)
    assert shuffled.roles == sorted_.roles
    assert shuffled.stacks == sorted_.stacks
    assert list(shuffled) == list(sorted_)


@given(st.sampled_from(sorted(STORED)), st.integers(0, 999), st.integers(0, 999))
def test_renaming_a_layer_round_trips(name: str, layer: int, other: int) -> None:
    structure = stored(name)
    for role in structure:
        moved = structure.rename_layer(role.name, layer)
        assert structure.rename_layer(structure.rename_layer(moved, other), layer) == moved
        if role.layer is None:
            assert moved == role.name
        else:
            assert structure.rename_layer(moved, role.layer) == role.name
            assert moved.startswith(f"{role.stack}.{layer}.")


@given(st.sampled_from(sorted(STORED)))
def test_shapes_only_add_knowledge(name: str) -> None:
    bare = Structure.of(STORED[name]["tensors"], STORED[name]["config"])
    assert Structure.of(list(STORED[name]["tensors"]), STORED[name]["config"]).roles == bare.roles


configs = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["num_hidden_layers", "text_config", "vocab_size", "head_dim", "hidden_size", "rope_scaling",
                         "num_attention_heads", "tie_word_embeddings", "num_nextn_predict_layers", "model_type"]),
        inner, max_size=5,
    ),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(["num_hidden_layers", "text_config", "vocab_size", "n_layer"]), configs))
def test_any_config_is_survived(config: dict[str, Any]) -> None:
    structure = Structure.of(dict.fromkeys(LLAMA, (4, 4)), config)
    assert len(structure) == len(LLAMA)
    assert isinstance(comparable_facts(config), dict)
    assert structure.vocabulary_axis("model.embed_tokens.weight") in (0, 1)

"""What a ``config.json`` says about depth, vocabulary and geometry, whatever the family calls it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

Config = Mapping[str, Any]
KeyPath = tuple[str, ...]

_DEPTH_KEYS = frozenset((
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers", "depth", "layers",
))  # fmt: skip

#: Config entries that list layers by index.
_INDEX_LISTS = frozenset((
    "mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "cross_attention_layers",
))  # fmt: skip

#: Config entries that speak of layers by count or period, or pack them into one word.
_PERIODS = frozenset((
    "first_k_dense_replace", "max_window_layers", "sliding_window_pattern", "decoder_sparse_step", "moe_layer_freq",
    "interleave_moe_layer_step", "no_rope_layer_interval", "attn_layer_period", "attn_layer_offset",
    "expert_layer_period", "expert_layer_offset", "full_attention_interval", "num_kv_shared_layers",
    "global_attn_every_n_layers", "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval",
    "attention_types", "hybrid_override_pattern",
))  # fmt: skip

_NOT_PER_LAYER = ("token", "architectures", "section", "size", "label", "languages")

_MAX_NESTING = 4


def sections(config: Config, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Config]]:
    """The config and, below it, the configs nested in it (text_config, vision_config, ...)."""
    yield path, config
    for key, value in config.items():
        if isinstance(value, Mapping) and len(path) < _MAX_NESTING and _is_model_config(key, value):
            yield from sections(value, (*path, str(key)))


def _is_model_config(key: str, value: Config) -> bool:
    return "model_type" in value or (
        key.endswith("_config") and key not in ("quantization_config", "generation_config")
    )


def depths(config: Config) -> dict[KeyPath, int]:
    """Every number of layers in the config, by its key path."""
    return {
        (*path, key): value
        for path, section in sections(config)
        for key, value in section.items()
        if key in _DEPTH_KEYS and _is_count(value)
    }


def extra_layers(config: Config) -> set[int]:
    """How many prediction layers may follow the counted ones in the same container (0 always may)."""
    found = [section.get("num_nextn_predict_layers") for _, section in sections(config)]
    return {0, *(value for value in found if _is_count(value))}


def vocabulary_sizes(config: Config) -> set[int]:
    found = [section.get("vocab_size") for _, section in sections(config)]
    return {value for value in found if _is_count(value)}


def lists_per_layer(section: Config, layers: int) -> dict[str, list[Any]]:
    """The entries of one config section that are lists with one element per layer."""
    lists = {key: value for key, value in section.items() if isinstance(value, list) and len(value) == layers}
    return {
        key: value
        for key, value in lists.items()
        if key not in _INDEX_LISTS and not any(word in key for word in _NOT_PER_LAYER)
    }


def layer_patterns(section: Config, layers: int) -> dict[str, Any]:
    """The entries of one section that speak of layers by count, period or index, and are no list per layer."""
    named = {key: value for key, value in section.items() if key in _INDEX_LISTS | _PERIODS and value}
    return {key: value for key, value in named.items() if key not in lists_per_layer(section, layers)}


def section_at(config: Config, path: KeyPath) -> Config:
    for key in path:
        config = config[key]
    return config


def ties_embeddings(config: Config) -> bool | None:
    """Whether head and embedding are one tensor; None when the config does not say."""
    said = [section["tie_word_embeddings"] for _, section in sections(config) if "tie_word_embeddings" in section]
    return any(said) if said else None


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


# --- comparing two models -------------------------------------------------------------------------------

_FACTS: dict[str, tuple[str, ...]] = {
    "model_type": ("model_type",),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
    "key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "head_dim": ("head_dim", "d_kv"),
    "activation": ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn"),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
    "tied_embeddings": ("tie_word_embeddings",),
}
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_pct", "rotary_emb_base")


def comparable_facts(config: Config) -> dict[str, Any]:
    """What two configs must agree on to be one backbone, under one name per fact; unknown facts are absent.

    Keys: model_type, architectures, hidden_size, attention_heads, key_value_heads, head_dim (derived from
    width and heads where not given), rope (older and newer spellings alike), activation, norm_eps,
    tied_embeddings, quantised; those of nested configs as "text_config.hidden_size" and so on.
    """
    facts: dict[str, Any] = {}
    for path, section in sections(config):
        prefix = "".join(f"{key}." for key in path)
        facts |= {prefix + fact: value for fact, value in _facts(section).items()}
    if "architectures" in config:
        facts["architectures"] = config["architectures"]
    if config:
        facts["quantised"] = bool(config.get("quantization_config"))
    return facts


def _facts(section: Config) -> dict[str, Any]:
    facts = {}
    for fact, keys in _FACTS.items():
        value = next((section[key] for key in keys if section.get(key) is not None), None)
        if value is not None:
            facts[fact] = value
    width, heads = facts.get("hidden_size"), facts.get("attention_heads")
    if "head_dim" not in facts and _is_count(width) and _is_count(heads) and width % heads == 0:
        facts["head_dim"] = width // heads
    rope = _rope(section)
    return facts | ({"rope": rope} if rope else {})


def _rope(section: Config) -> dict[str, Any]:
    """Rotary settings as one flat dict: newer configs gather in rope_parameters what older ones spread."""
    rope: dict[str, Any] = {}
    for key in _ROPE:
        value = section.get(key)
        if isinstance(value, Mapping):
            rope |= value
        elif value is not None:
            rope[key] = value
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    return {"rope_type": "default", **rope} if rope else {}

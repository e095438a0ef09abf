"""The settings of a model: GGUF's metadata and Hugging Face's config.json, in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .families import Family
from .format import F32, U32
from .header import Texts
from .rotary import count_in, rope_of, scaling_entries, scaling_of, shortest

#: (key behind the architecture, key of the config, kind).
_SETTINGS = (
    ("context_length", "max_position_embeddings", U32), ("embedding_length", "hidden_size", U32),
    ("block_count", "num_hidden_layers", U32), ("feed_forward_length", "intermediate_size", U32),
    ("attention.head_count", "num_attention_heads", U32), ("attention.head_count_kv", "num_key_value_heads", U32),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps", F32), ("rope.freq_base", "rope_theta", F32),
    ("attention.key_length", "head_dim", U32), ("attention.sliding_window", "sliding_window", U32),
    ("attn_logit_softcapping", "attn_logit_softcapping", F32),
    ("final_logit_softcapping", "final_logit_softcapping", F32), ("expert_used_count", "num_experts_per_tok", U32),
    ("expert_feed_forward_length", "moe_intermediate_size", U32),
    ("expert_shared_feed_forward_length", "shared_expert_intermediate_size", U32),
)  # fmt: skip

#: Token ids, by GGUF's word and by the config's.
SPECIAL_IDS = {
    "bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id",
}  # fmt: skip

#: How many layers the largest Gemma has.
_LARGEST = {"gemma2": 46, "gemma3_text": 62}


def model_type_of(family: Family, metadata: Mapping[str, Any]) -> str:
    """Which of the models that an architecture stands for a file holds, by its experts and its name."""
    if len(family.models) == 1:
        return next(iter(family.models))
    if count_in(metadata, f"{family.architecture}.expert_count"):
        return "mixtral"
    names = " ".join(str(metadata.get(f"general.{key}", "")) for key in ("basename", "name")).lower()
    return "mistral" if "mistral" in names else "llama"


def config_of(
    family: Family, metadata: Mapping[str, Any], vocabulary: int | None, tied: bool
) -> tuple[dict[str, Any], list[str]]:
    """The config that a file's metadata spell, and what of them is not understood.

    ``vocabulary``: rows of the embedding; ``tied``: no head is stored.
    """
    model, own = model_type_of(family, metadata), f"{family.architecture}."
    config: dict[str, Any] = {"architectures": [family.models[model]], "model_type": model, **family.constants}
    notices = []
    for key, theirs, _ in _SETTINGS:
        value = metadata.get(own + key)
        if isinstance(value, np.ndarray | Texts | str):
            notices.append(f"{own}{key} is given per layer, which config.json does not tell")
        elif value is not None and (theirs, value) != ("sliding_window", 0):
            config[theirs] = shortest(value)
    _fill(config, metadata, own)
    if vocabulary is not None:
        config["vocab_size"] = vocabulary
    ids = ((metadata.get(f"tokenizer.ggml.{word}_token_id"), key) for word, key in SPECIAL_IDS.items())
    config |= {key: index for index, key in ids if isinstance(index, int)}
    return {**config, "tie_word_embeddings": tied}, notices


def _fill(config: dict[str, Any], metadata: Mapping[str, Any], own: str) -> None:
    """What is stated in other words, or goes without saying."""
    model = config["model_type"]
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    rotated = count_in(metadata, own + "rope.dimension_count")
    config.setdefault("rope_theta", 1e6 if model == "gemma3_text" else 10000.0)
    if heads is not None:
        config.setdefault("num_key_value_heads", heads)
    if heads and width and "head_dim" not in config:
        config["head_dim"] = (rotated if own == "llama." else None) or width // heads
    if experts := count_in(metadata, own + "expert_count"):
        config["num_local_experts" if model == "mixtral" else "num_experts"] = experts
    if heads and width and model in _LARGEST:
        config["query_pre_attn_scalar"] = _query_scale(config)
    if model == "phi3" and rotated and config.get("head_dim", rotated) not in (0, rotated):
        config["partial_rotary_factor"] = rotated / config["head_dim"]
    if scaling := scaling_of(metadata, own + "rope.scaling."):
        config["rope_scaling"] = scaling


def _query_scale(config: Mapping[str, Any]) -> int:
    """What Gemma divides attention by the root of: the width of a head, in the largest model its share of the whole."""
    share: int = config["hidden_size"] // config["num_attention_heads"]
    largest = config.get("num_hidden_layers") == _LARGEST[config["model_type"]]
    return share if largest else config.get("head_dim", share)


# --- from a config to metadata --------------------------------------------------------------------------


def metadata_of(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, int, Any]]:
    """(key, kind, value) of what a config says. ValueError, with a sentence, where it lacks what is needed."""
    own = f"{family.architecture}."
    _check_computed(family, config)
    stated = {**config, "rope_theta": rope_of(config)["rope_theta"]}
    if stated.get("use_sliding_window") is False:
        stated["sliding_window"] = None
    for key in ("max_position_embeddings", "num_hidden_layers", "intermediate_size"):
        _needed(config, key)
    heads, width = (_needed(config, key) for key in ("num_attention_heads", "hidden_size"))
    if not isinstance(config.get("rms_norm_eps"), float):
        raise ValueError(f"config.json says rms_norm_eps = {config.get('rms_norm_eps')!r}, expected a number")
    stated.setdefault("num_key_value_heads", heads)
    if family.architecture == "phi3" and stated.get("sliding_window") is None:
        stated["sliding_window"] = 0  # llama.cpp would take it for an old file, and guess
    for key, theirs, kind in _SETTINGS:
        value = stated.get(theirs)
        if value is not None:
            yield own + key, kind, value
    size = config.get("head_dim") or width // heads
    if config.get("head_dim"):
        yield own + "attention.value_length", U32, size
    if family.architecture in ("llama", "phi3"):
        part = config.get("partial_rotary_factor") or rope_of(config).get("partial_rotary_factor", 1)
        yield own + "rope.dimension_count", U32, int(size * part)
    yield own + "vocab_size", U32, _needed(config, "vocab_size")
    experts = config.get("num_experts") or config.get("num_local_experts")  # by age of the file, not by family
    if family.experts and config["model_type"] not in ("llama", "mistral"):
        yield own + "expert_count", U32, _whole("num_experts", experts)
    yield from scaling_entries(family.architecture, config)


def _check_computed(family: Family, config: Mapping[str, Any]) -> None:
    """ValueError where llama.cpp would compute something else than what the config says."""
    fixed = {} if family.shifted else dict(family.constants)
    if config["model_type"] in _LARGEST and {"hidden_size", "num_attention_heads"} <= config.keys():
        fixed["query_pre_attn_scalar"] = _query_scale(config)
    for key, value in fixed.items():
        if config.get(key) not in (None, value):
            raise ValueError(f"config.json says {key} = {config[key]!r}, llama.cpp always computes with {value!r}")


def _needed(config: Mapping[str, Any], key: str) -> int:
    return _whole(key, config.get(key))


def _whole(key: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json says {key} = {value!r}, expected a whole number: GGUF needs it")
    return value

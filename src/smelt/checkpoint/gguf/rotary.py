"""Rotary embeddings: what Hugging Face says in settings, and GGUF partly in tensors of factors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .format import F32, TEXT, U32

Factors = npt.NDArray[np.float32]

_ORIGINAL = "original_max_position_embeddings"

#: What Llama 3.1 to 3.3 spread their context with; a GGUF file holds only the factors that follow from it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, _ORIGINAL: 8192}

#: The two names of what Phi-3 does with its own factors for short and long contexts.
_LONG = ("longrope", "su")

LLAMA3_FACTORS = "rope_freqs.weight"
LONG_FACTORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}


def shortest(value: Any) -> Any:
    """A float32 by the shortest decimal number that stands for it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def count_in(metadata: Mapping[str, Any], key: str) -> int | None:
    """The whole number that a file states, or None: a file may state anything."""
    value = metadata.get(key)
    return value if isinstance(value, int) and value >= 0 else None


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings as one mapping, whichever way the config spells them."""
    rope = {key: config[key] for key in ("rope_theta", _ORIGINAL) if key in config}
    for key in ("rope_scaling", "rope_parameters"):
        section = config.get(key)
        rope |= section.get("full_attention", section) if isinstance(section, Mapping) else {}
    return {"rope_theta": 10000.0, **rope, "rope_type": rope.get("rope_type") or rope.get("type") or "default"}


# --- from GGUF ------------------------------------------------------------------------------------------


def scaling_of(metadata: Mapping[str, Any], own: str) -> dict[str, Any] | None:
    """The scaling that metadata spell, the keys of which begin with ``own``; None where there is none."""
    kind, factor = metadata.get(own + "type"), metadata.get(own + "factor")
    if not isinstance(kind, str) or kind not in ("linear", "yarn") or not isinstance(factor, int | float):
        return None
    original = count_in(metadata, own + "original_context_length")
    known = {} if original is None else {_ORIGINAL: original}
    return {"rope_type": kind, "factor": shortest(factor), **known}


def llama3_scaling(factors: Factors, theta: float) -> dict[str, Any] | None:
    """The settings of Llama 3 that give these factors, or None where they are others."""
    rope = {"rope_type": "llama3", "factor": shortest(float(factors.max())), **_LLAMA3}
    with np.errstate(all="ignore"):
        made = _llama3_factors({**rope, "rope_theta": theta}, 2 * len(factors))
    return rope if np.allclose(made, factors, rtol=1e-4) else None


def long_scaling(factors: Mapping[str, Factors]) -> dict[str, Any]:
    """The settings of Phi-3 with factors of its own, by the keys of :data:`LONG_FACTORS`."""
    return {"rope_type": "longrope", **{key: [float(str(one)) for one in found] for key, found in factors.items()}}


# --- to GGUF --------------------------------------------------------------------------------------------


def scaling_entries(architecture: str, config: Mapping[str, Any]) -> Iterator[tuple[str, int, Any]]:
    """(key, kind, value) of the scaling that a config asks for. ValueError for what llama.cpp does not do."""
    rope, own = rope_of(config), f"{architecture}.rope.scaling."
    kind = rope["rope_type"]
    if kind == "default" or (kind, architecture) == ("llama3", "llama"):  # that is a tensor
        return
    if kind in _LONG and architecture == "phi3":
        yield own + "attn_factor", F32, _attention_factor(config["max_position_embeddings"] / rope[_ORIGINAL], rope)
        yield own + "original_context_length", U32, rope[_ORIGINAL]
        return
    if kind not in ("linear", "yarn"):
        raise ValueError(f"config.json scales rotary embeddings by {kind!r}, which is not written to GGUF")
    yield own + "type", TEXT, kind
    yield own + "factor", F32, rope["factor"]
    if kind == "yarn" and _ORIGINAL in rope:
        yield own + "original_context_length", U32, rope[_ORIGINAL]


def _attention_factor(scale: float, rope: Mapping[str, Any]) -> float:
    return math.sqrt(1 + math.log(scale) / math.log(rope[_ORIGINAL])) if scale > 1 else 1.0


def rope_tensors(architecture: str, config: Mapping[str, Any]) -> dict[str, Factors]:
    """What is a tensor there: for each pair of a head's dimensions, what its frequency is divided by."""
    rope = rope_of(config)
    if (rope["rope_type"], architecture) == ("llama3", "llama"):
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return {LLAMA3_FACTORS: _llama3_factors(rope, width)}
    if rope["rope_type"] in _LONG and architecture == "phi3":
        return {name: np.asarray(rope[key], np.float32) for key, name in LONG_FACTORS.items()}
    return {}


def _llama3_factors(rope: Mapping[str, Any], width: int) -> Factors:
    """By what Llama 3 divides each of the ``width`` / 2 frequencies of a head: float32, computed in float32."""
    frequencies = 1 / np.float32(rope["rope_theta"]) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    length = np.float32(2 * np.pi) / frequencies
    low, high, original = (rope[key] for key in ("low_freq_factor", "high_freq_factor", _ORIGINAL))
    smooth = (original / length.astype(np.float64) - low) / (high - low)
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    slow = np.where(length > original / low, rope["factor"], between)
    return np.where(length < original / high, 1, slow).astype(np.float32)

"""GGUF files for tests, made by the gguf package where it is there, and byte by byte."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.small_models import CONFIG, Arrays

#: Metadata value types by the letter that struct has for them.
KINDS = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "?": 7, "Q": 10, "q": 11, "d": 12}

LLAMA = {
    "general.architecture": "llama", "llama.context_length": ("I", 2048), "llama.embedding_length": ("I", 64),
    "llama.block_count": ("I", 2), "llama.feed_forward_length": ("I", 128), "llama.attention.head_count": ("I", 4),
    "llama.attention.head_count_kv": ("I", 2), "llama.attention.layer_norm_rms_epsilon": ("f", 1e-5),
    "llama.rope.freq_base": ("f", 10000.0), "llama.rope.dimension_count": ("I", 16),
}  # fmt: skip

_WORDS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(item: Any) -> bytes:
    """A metadata value with its type: text, a list of texts, or (letter, number or list of numbers)."""
    if isinstance(item, str | bytes):
        return struct.pack("<I", 8) + text(item)
    if isinstance(item, list):
        return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(text, item))
    letter, number = item
    if isinstance(number, list):
        return struct.pack("<IIQ", 9, KINDS[letter], len(number)) + struct.pack(f"<{len(number)}{letter}", *number)
    return struct.pack("<I" + letter, KINDS[letter], number)


def packed(
    metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]], *, version: int = 3,
    magic: bytes = b"GGUF", alignment: int = 32, counts: tuple[int, int] | None = None,
    offsets: Mapping[str, int] | None = None,
) -> bytes:  # fmt: skip
    """A whole file. ``tensors``: name -> (type, shape with the slowest axis first, bytes)."""
    numbers = (len(tensors), len(metadata)) if counts is None else counts
    head = magic + struct.pack("<IQQ", version, *numbers)
    head += b"".join(text(key) + value(item) for key, item in metadata.items())
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        at = (offsets or {}).get(name, len(data))
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += text(name) + sizes + struct.pack("<IQ", kind, at)
        data += raw + bytes(-len(raw) % alignment)
    return head + bytes(-len(head) % alignment) + data


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor of a Llama."""
    body, _, end = name.rpartition(".")
    prefix, _, inner = body.partition("model.layers.")
    if not prefix and inner:
        layer, _, rest = inner.partition(".")
        return f"blk.{layer}.{_WORDS[rest]}.{end}"
    return f"{_WORDS[body]}.{end}"


def permuted(array: Any, heads: int) -> Any:
    """Rows as llama.cpp's converter puts them: the halves of each head take turns."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def stored_llama(arrays: Arrays) -> Arrays:
    """The float32 tensors of a Llama as they lie in GGUF."""
    heads = {"q_proj": CONFIG["num_attention_heads"], "k_proj": CONFIG["num_key_value_heads"]}
    found = {}
    for name, array in arrays.items():
        values = np.asarray(array, np.float32)
        part = name.split(".")[-2]
        found[gguf_name(name)] = permuted(values, heads[part]) if part in heads else values
    return found


def q8_0(values: Any) -> bytes:
    """Blocks of 32: the largest magnitude / 127 as float16, then the codes, ties away from zero."""
    blocks = np.asarray(values, np.float32).reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        scaled = blocks * np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    codes = np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))
    parts = [scale.astype(np.float16).view(np.uint8), codes.astype(np.int8).view(np.uint8)]
    return np.concatenate(parts, axis=1).tobytes()


def unpacked_q8_0(raw: bytes) -> Any:
    blocks = np.frombuffer(raw, np.uint8).reshape(-1, 34)
    scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    return (scale * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)).reshape(-1)


def complete(model: str, folder: Path) -> str:
    """A copy of a model that can be written as GGUF: its config says more, and its words are no tokenizer."""
    shutil.copytree(model, folder)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return str(folder)


def save_llama(path: Path, arrays: Arrays, *, quantised: bool, metadata: Mapping[str, Any] = LLAMA) -> str:
    """A Llama as GGUF: matrices as Q8_0 or F32, vectors as F32; returns the path as text."""
    tensors = {}
    for name, array in stored_llama(arrays).items():
        if quantised and array.ndim > 1:
            tensors[name] = (8, array.shape, q8_0(array))
        else:
            tensors[name] = (0, array.shape, array.tobytes())
    path.write_bytes(packed(metadata, tensors))
    return str(path)

"""Small models whose embeddings are known token by token, for tests that align vocabularies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.small_models import CONFIG, HIDDEN, Arrays, bf16, fine_tuned, llama, save

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BODY = {name: array for name, array in llama(0).items() if name not in (EMBEDDING, HEAD)}
SPECIAL = ["<unk>", "<s>", "</s>"]
IDS = {"bos_token_id": 1, "eos_token_id": 2}


def row(token: str, tensor: str, seed: int) -> Any:
    """The row of a token in the model ``seed``: near to the same token's in other models."""
    drawn = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) for text in (token + tensor, f"{token}{seed}")]
    near, noise = (np.random.default_rng(number).standard_normal(HIDDEN) for number in drawn)
    return (0.02 * near + 0.001 * noise).astype(np.float32)


def tensors(tokens: Sequence[str], seed: int, padding: int = 0, tied: bool = False) -> Arrays:
    """A model with these tokens in this order, and rows behind them that no token has."""
    words = [*tokens, *(f"padding {i}" for i in range(padding))]
    rows = {name: np.stack([row(word, name, seed) for word in words]) for name in (EMBEDDING, HEAD)}
    return {**fine_tuned(BODY, seed), EMBEDDING: rows[EMBEDDING], **({} if tied else {HEAD: rows[HEAD]})}


def added(index: int, token: str, **more: Any) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": token, **plain, **more}


def tokenizer(tokens: Sequence[str], special: Sequence[str] = SPECIAL) -> dict[str, Any]:
    """A tokenizer of whole words; the ``special`` ones among them are added tokens."""
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [added(tokens.index(token), token) for token in special if token in tokens],
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {
            "type": "WordLevel", "vocab": {token: i for i, token in enumerate(tokens)}, "unk_token": "<unk>",
        },
    }  # fmt: skip


def make(
    folder: Path, tokens: Sequence[str], seed: int, *, padding: int = 0, tied: bool = False, half: bool = False,
    files: Mapping[str, Any] | None = None, special: Sequence[str] = SPECIAL, **config: Any,
) -> str:  # fmt: skip
    """Write a model; ``files`` are further ones (text, or what becomes JSON), None leaves one out."""
    arrays = tensors(tokens, seed, padding, tied)
    rows = len(tokens) + padding
    stated = {**CONFIG, **IDS, "vocab_size": rows, "tie_word_embeddings": tied, "torch_dtype": "float32", **config}
    path = save(folder, bf16(arrays) if half else arrays, config=stated)
    everything = {
        "tokenizer.json": tokenizer(tokens, special),
        "tokenizer_config.json": {"eos_token": "</s>"},
        "generation_config.json": {"do_sample": True, **IDS},
        **(files or {}),
    }
    for name, content in everything.items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")
    return path


def words(count: int, prefix: str = "w") -> list[str]:
    return [*SPECIAL, *(f"{prefix}{i}" for i in range(count))]


def written(folder: Path) -> Arrays:
    return dict(load_file(folder / "model.safetensors"))


def read(folder: Path, name: str) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return tree


def ids(folder: Path) -> dict[str, int]:
    """Token -> id as the tokenizers library loads the written file."""
    from tokenizers import Tokenizer

    found: dict[str, int] = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    return found

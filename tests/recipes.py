"""Models on disk and recipes over them, for tests that merge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from smelt import methods
from tests.small_models import CONFIG, TOKENS, Arrays, bf16, fine_tuned, llama, save


@dataclass(frozen=True)
class Family:
    """A base and its fine-tunes: paths, and the values that the files hold."""

    folder: Path
    base: str
    models: tuple[str, ...]
    base_arrays: Arrays
    model_arrays: tuple[Arrays, ...]


def make_family(folder: Path) -> Family:
    """A small bfloat16 Llama and three fine-tunes of it."""
    base = llama(0)
    arrays = bf16(base)
    tuned = tuple(bf16(fine_tuned(base, seed)) for seed in (1, 2, 3))
    paths = tuple(save(folder / f"expert{i}", model, tokens=TOKENS) for i, model in enumerate(tuned))
    return Family(folder, save(folder / "base", arrays, tokens=TOKENS), paths, arrays, tuned)


def recipe(
    method: str,
    models: Sequence[str | Path],
    base: str | Path | None = None,
    *,
    each: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A ``models:`` recipe as a mapping; ``more`` are top-level keys.

    ``each`` holds for every model. Where the method takes weights these are 1 unless ``each`` says otherwise.
    """
    own = {"weight": 1.0} if methods.get(method).parameter("weight") else {}
    entries = [{"model": str(model), "parameters": {**own, **(each or {})}} for model in models]
    tree: dict[str, Any] = {"merge_method": method, "models": entries, **more}
    if base is not None:
        tree["base_model"] = str(base)
    if parameters:
        tree["parameters"] = dict(parameters)
    return tree


def save_shards(folder: Path, parts: Sequence[Arrays], config: Mapping[str, Any] = CONFIG) -> str:
    """Write a model whose tensors lie in several files; returns the path as text."""
    folder.mkdir()
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, {"format": "pt"})
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    index = {
        "metadata": {"total_size": sum(a.nbytes for part in parts for a in part.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)

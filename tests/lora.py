"""Adapters of the small Llama, in memory and on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.small_models import LAYERS, Arrays

QUERY, VALUE = "self_attn.q_proj", "self_attn.v_proj"


def factors(names: Mapping[str, tuple[int, int]], seed: int) -> Arrays:
    random, found = np.random.default_rng(seed), {}
    for name, (outputs, inputs) in names.items():
        found[f"base_model.model.{name}.lora_A.weight"] = random.standard_normal((2, inputs)).astype(np.float32)
        found[f"base_model.model.{name}.lora_B.weight"] = random.standard_normal((outputs, 2)).astype(np.float32)
    return found


def shapes_of(module: str) -> tuple[int, int]:
    rows, columns = {"q": (64, 64), "v": (32, 64)}[module.rpartition(".")[2][0]]
    return rows, columns


def written(folder: Path, seed: int, **config: Any) -> Path:
    """An adapter of the family's base on disk."""
    modules = [f"model.layers.{layer}.{part}" for layer in range(LAYERS) for part in (QUERY, VALUE)]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(factors({m: shapes_of(m) for m in modules}, seed), folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 0.02, "base_model_name_or_path": "/etc/../etc/passwd"}
    (folder / "adapter_config.json").write_text(json.dumps({**content, **config}))
    return folder

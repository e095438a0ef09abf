"""Small PEFT adapters on disk, and what their files do, read in the plainest way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Arrays = dict[str, Any]

SHAPES = {
    "model.layers.0.self_attn.q_proj": (24, 24), "model.layers.0.self_attn.k_proj": (12, 24),
    "model.layers.0.mlp.down_proj": (24, 36), "model.layers.1.self_attn.q_proj": (24, 24),
}  # fmt: skip


def factors(rank: int, seed: int, shapes: dict[str, tuple[int, int]] | None = None, dtype: str = "f4") -> Arrays:
    """Random factors of linear layers, by PEFT's names."""
    draw = np.random.default_rng([seed, rank])
    found: Arrays = {}
    for name, (m, n) in (SHAPES if shapes is None else shapes).items():
        found[f"base_model.model.{name}.lora_A.weight"] = draw.standard_normal((rank, n)).astype(dtype)
        found[f"base_model.model.{name}.lora_B.weight"] = draw.standard_normal((m, rank)).astype(dtype)
    return found


def save_adapter(folder: Path, tensors: Arrays, **config: Any) -> Path:
    """An adapter's folder; r is that of its factors unless it is given."""
    folder.mkdir(parents=True)
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "adapter_model.safetensors"
    )
    rank = next((len(array) for name, array in tensors.items() if "lora_A" in name), 1)
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors if ".lora_" in name})
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return read


def changes(folder: Path) -> Arrays:
    """Module -> alpha / r B A, in fp64; for the configs that are written here."""
    config, tensors = config_of(folder), load_file(folder / "adapter_model.safetensors")
    found: Arrays = {}
    for name, a in tensors.items():
        module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        if part in ("A.weight", "embedding_A"):
            b = tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            rank = config.get("rank_pattern", {}).get(module, config["r"])
            alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
            scaling = alpha / (np.sqrt(rank) if config.get("use_rslora") else rank)
            assert len(a) == rank
            product = b.astype("f8").reshape(len(b), -1) @ a.astype("f8").reshape(len(a), -1)
            found[module] = scaling * product
    return found

"""LoRA extraction."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import smelt
from smelt.checkpoint import load_adapter

from ..case import Arrays, Inputs, Mismatch

_NAMES = {
    "max_rank": "rank", "embed_lora": "embeddings", "include_regex": "include", "exclude_regex": "exclude",
    "save_module": "save_modules",
}  # fmt: skip
_LISTS = ("include", "exclude", "save_modules")


def extract_lora(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    options = {_NAMES.get(name, name): value for name, value in parameters.items()}
    options |= {name: [options[name]] for name in _LISTS if isinstance(options.get(name), str)}
    (model,) = inputs.each("model")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        smelt.extract_lora(inputs.base, model, out, **options)
        if not smelt.verify(out).ok:
            raise Mismatch("the adapter does not verify")
        _compare_configs(json.loads((out / "adapter_config.json").read_text()), inputs.case)
        with load_adapter(out) as adapter:
            return parts(dict(adapter))


def parts(adapter: Arrays) -> Arrays:
    """What does not depend on the signs of singular vectors: products, how the scale is distributed, whole tensors."""
    found: Arrays = {}
    for name, array in adapter.items():
        module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        if part == "A.weight":
            b = adapter[name.replace(".lora_A.", ".lora_B.")]
            found[f"product/{module}.weight"] = b @ array
            found[f"a_gram/{module}.weight"] = array @ array.T
        elif part == "embedding_A":
            found[f"product_embedding/{module}.weight"] = adapter[name[:-1] + "B"] @ array
        elif not part:
            found[f"full/{module}"] = array
    return {name: np.asarray(array) for name, array in found.items()}


def _compare_configs(config: dict[str, Any], case: dict[str, Any]) -> None:
    wanted = case["adapter_config"]
    for key, value in wanted.items():
        got = config[key]
        if key in ("target_modules", "modules_to_save"):
            got, value = set(got or ()), set(value)
        # Without a config.json nothing is known of the task.
        if got != value and key != "task_type":
            raise Mismatch(f"adapter_config {key}: {got}, expected {value}")


RUNNERS = {"extract_lora": extract_lora}

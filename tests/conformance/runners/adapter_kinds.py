"""Kinds of adapters that are given as inputs: FLoRA and MoS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import smelt
from smelt.checkpoint import Checkpoint, load_adapted
from smelt.checkpoint.adapter import Adapter, parse

from ..case import Arrays, Inputs


def flora(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    (tensors,) = inputs.each("model")
    adapter = parse(smelt.load(tensors), {"peft_type": "FLORA", "scale": parameters["scale"], "r": parameters["r"]})
    found = _applied(inputs, adapter)
    return {**found, "output": _forward(inputs, found["merged/layer.weight"])}


def _forward(inputs: Inputs, weight: Any) -> Any:
    """A linear layer, or a convolution of stride 1 that keeps the size."""
    x, bias = inputs.data["data/x"], inputs.base["layer.bias"]
    kernel = weight.shape[2:]
    if not kernel:
        return x @ weight.T + bias
    padded = np.pad(x, [(0, 0), (0, 0), *((size // 2, size // 2) for size in kernel)])
    axes = tuple(range(2, x.ndim))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axes)
    summed = (1, *range(x.ndim, windows.ndim))
    out = np.tensordot(windows, weight, (summed, range(1, weight.ndim)))
    return np.moveaxis(out + bias, -1, 1).astype(np.float32)


def mos(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    (pools,) = inputs.each("model")
    tables = {name.removeprefix("data/"): array for name, array in inputs.data.items()}
    keys = ("r", "lora_alpha", "equivalent_rank", "private_rank", "shards_per_vector")
    config = {"peft_type": "MOS", **{key: parameters[key] for key in keys}}
    adapter = parse(smelt.load({**pools, **tables}), config)
    return {**_applied(inputs, adapter), **_factors(inputs, adapter)}


def _applied(inputs: Inputs, adapter: Adapter) -> Arrays:
    """The changed tensors, and what they become on a base of zeros."""
    names = [update.target for update in adapter.updates]
    merged = _on(inputs.base, adapter)
    delta = _on({name: np.zeros_like(array) for name, array in inputs.base.items()}, adapter)
    return {f"{part}/{name}": model[name] for part, model in (("delta", delta), ("merged", merged)) for name in names}


def _factors(inputs: Inputs, adapter: Adapter) -> Arrays:
    merged, found = _on(inputs.base, adapter), {}
    for update in adapter.updates:
        factors = merged.factors(update.target)
        assert factors is not None
        found[f"lora/{update.module}.lora_A.weight"] = factors.right
        found[f"lora/{update.module}.lora_B.weight"] = factors.left
    return found


def _on(base: Mapping[str, Any], adapter: Adapter) -> Checkpoint:
    return load_adapted(smelt.load(base), [(adapter, 1.0)], "adapted")


RUNNERS = {"flora": flora, "mos": mos}

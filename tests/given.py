"""Statistics for every method that needs some: positive random numbers, of the shapes that it asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from smelt.methods import Method, Statistic
from tests.small_models import Arrays

Given = dict[str, Arrays]


def statistics_for(method: Method, chosen: Mapping[str, Any], models: Sequence[Arrays]) -> list[Given]:
    """What ``merge_tensors`` takes beside ``models`` where these parameters are set and the others are not."""
    variant = chosen.get("variant", method.variants[0])
    shared = {parameter.name: parameter.default_for(variant) for parameter in method.parameters} | dict(chosen)
    used = [statistic for statistic in method.statistics if statistic.used(shared)]
    beside = models[:1] if any(statistic.single for statistic in used) else models
    return [{statistic.kind: _drawn(statistic, model, seed) for statistic in used} for seed, model in enumerate(beside)]


def _drawn(statistic: Statistic, model: Arrays, seed: int) -> Arrays:
    """Numbers that depend on the name, not on the place among the others."""
    shapes = {name: _shape(statistic, array.shape) for name, array in model.items()}
    return {
        name: np.asarray(0.5 + np.random.default_rng([seed, *name.encode()]).random(shape), np.float32)
        for name, shape in shapes.items()
        if shape is not None
    }


def _shape(statistic: Statistic, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    if statistic.shape == "tensor":
        return shape
    if statistic.shape == "number":
        return ()
    if statistic.shape == "columns":
        return shape[-1:] if len(shape) in (1, 2) else None
    return shape[-1:] * 2 if len(shape) == 2 else None


def save_statistics(path: Path, given: Given) -> str:
    """One file that holds all kinds; returns the path as text."""
    flat = {f"{kind}/{name}": array for kind, arrays in given.items() for name, array in arrays.items()}
    save_file(flat, path)
    return str(path)

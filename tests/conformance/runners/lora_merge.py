"""Merging LoRA adapters: PEFT's combination types, and methods in core space."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

import smelt
from smelt.checkpoint import load_adapter
from tests.lora_files import changes, save_adapter

from ..case import Arrays, Inputs, Mismatch

_OPTIONS = ("weights", "combination_type", "density", "majority_sign_method")


def lora_merge(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if parameters.get("merge_space") == "core":
            return _in_core(inputs, parameters, folder)
        return _like_peft(inputs, parameters, folder)


def _like_peft(inputs: Inputs, parameters: dict[str, Any], folder: Path) -> Arrays:
    known = {*_OPTIONS, "svd_rank", "svd_full_matrices", "adapters", "output_scaling", "target_modules"}
    _refuse({name: value for name, value in parameters.items() if name not in known})
    paths = [
        save_adapter(folder / str(place), tensors, **parameters["adapters"][place])
        for place, tensors in enumerate(inputs.each("model"))
    ]
    options = {name: parameters[name] for name in _OPTIONS if name in parameters}
    smelt.merge_lora(paths, folder / "out", rank=parameters.get("svd_rank"), **options)
    found = {f"delta/{module}.weight": change.astype("f4") for module, change in changes(folder / "out").items()}
    with load_adapter(folder / "out") as adapter:
        for name, array in adapter.items():
            module, _, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
            found[f"{factor}/{module}.weight"] = array
    return {name: array for name, array in found.items() if name.startswith("delta/") or name in inputs.expected}


def _in_core(inputs: Inputs, parameters: dict[str, Any], folder: Path) -> Arrays:
    known = {"merge_space", "merge_method", "isotropize", "scaling_coeff", "lora_scaling", "topK"}
    _refuse({name: value for name, value in parameters.items() if name not in known})
    scaling = parameters.get("lora_scaling", 1.0)
    paths = [
        save_adapter(folder / str(place), tensors, lora_alpha=scaling * _rank(tensors))
        for place, tensors in enumerate(inputs.each("model"))
    ]
    level, scale = parameters.get("isotropize"), parameters["scaling_coeff"]
    method, options = _method(parameters, 1.0 if level else scale, len(paths))
    smelt.merge_lora(paths, folder / "merged", method=method, parameters=options)
    if level:
        smelt.merge_lora([folder / "merged"], folder / "level", method="iso", parameters={"alpha": scale})
    save_file(inputs.base, folder / "base.safetensors")
    with smelt.load(f"{folder / 'base.safetensors'}+{folder / ('level' if level else 'merged')}") as adapted:
        return dict(adapted)


def _method(parameters: Mapping[str, Any], scale: float, count: int) -> tuple[str, dict[str, Any]]:
    name = parameters["merge_method"]
    if name in ("sum", "tv", "mean"):
        return "task_arithmetic", {"lambda": scale / (count if name == "mean" else 1)}
    if name == "ties":
        return "ties", {"lambda": scale, "density": parameters.get("topK", 10) / 100, "scope": "tensor"}
    if name == "tsv":
        return "tsv", {"alpha": scale}
    raise Mismatch(f"merge_method {name!r} is not known")


def _rank(tensors: Arrays) -> int:
    return next(len(array) for name, array in tensors.items() if "lora_A" in name)


def _refuse(unknown: Mapping[str, Any]) -> None:
    if unknown:
        raise Mismatch(f"parameters that are not known: {', '.join(unknown)}")


RUNNERS = {"lora_merge": lora_merge}

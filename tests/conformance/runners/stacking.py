"""Layer stacking: recipes of slices, run on models on disk."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

import smelt

from ..case import Arrays, Inputs, Mismatch


def layer_stacking(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    models = inputs.each("model")
    with tempfile.TemporaryDirectory() as scratch:
        paths = {
            name: saved(Path(scratch) / name, models[int(place.removeprefix("model."))])
            for name, place in parameters["models"].items()
        }
        out = Path(scratch) / "out"
        # Models of random numbers share no backbone.
        smelt.merge(_renamed(parameters["config"], paths), out, force=True)
        config = json.loads((out / "config.json").read_text())
        for ours, theirs in (("num_hidden_layers", "num_hidden_layers"), ("dtype", "torch_dtype")):
            if config[ours] != inputs.case[theirs]:
                raise Mismatch(f"config.json: {ours} is {config[ours]}, expected {inputs.case[theirs]}")
        with smelt.load(out) as checkpoint:
            return dict(checkpoint)


def saved(folder: Path, tensors: Arrays) -> str:
    """A Llama of so many layers as its tensors have, on disk."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": len(layers)}))
    return str(folder)


def _renamed(recipe: Any, paths: dict[str, str]) -> Any:
    """The recipe with its models' names replaced by paths."""
    if isinstance(recipe, list):
        return [_renamed(item, paths) for item in recipe]
    if not isinstance(recipe, dict):
        return recipe
    return {
        key: paths[value] if key in ("model", "base_model") else _renamed(value, paths) for key, value in recipe.items()
    }


RUNNERS = {"layer_stacking": layer_stacking}

"""config.json of the output: the donor's, byte for byte, but for what the merge changed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..architecture import role_of
from ..architecture.config import sections
from ..kernels.dtypes import DTYPES, name_of
from .inputs import read_config

if TYPE_CHECKING:
    from .planning import Plan


def patched_config(plan: Plan) -> bytes | None:
    """The donor's config.json with dtype, layer count, per-layer lists and tied head as the output has them.

    None when the donor has no config.
    """
    raw = read_config(plan.inputs.donor.checkpoint)
    if raw is None:
        return None
    config = json.loads(raw)
    before = json.dumps(config)
    _set_dtype(plan, config)
    _set_layers(plan, config)
    _untie(plan, config)
    config = _with_vocabulary(plan, config)
    if json.dumps(config) == before:
        return raw
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _set_dtype(plan: Plan, config: dict[str, Any]) -> None:
    """The dtype that most of the output's elements have, under the key that the donor uses."""
    weights: dict[str, int] = {}
    for output in plan.outputs:
        if DTYPES[output.dtype].arithmetic:
            weights[output.dtype] = weights.get(output.dtype, 0) + output.count
    if not weights:
        return
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    name = name_of(max(sorted(weights), key=weights.__getitem__))
    if key in config or plan.recipe.written_dtype is not None:
        config[key] = name


def _set_layers(plan: Plan, config: dict[str, Any]) -> None:
    """The number of layers, and lists with one entry per layer in the new order."""
    structure = plan.inputs.donor.structure
    for stack, layer_map in plan.layout.depths:
        for path, values in structure.lists_of(stack).items():
            _put(config, path, [values[layer] for layer in layer_map])
        for path in stack.count_keys:
            _put(config, path, len(layer_map))


def _untie(plan: Plan, config: dict[str, Any]) -> None:
    """A head that is stored must be read: a config that ties it would ignore it."""
    if config.get("tie_word_embeddings") and any(role_of(output.name) == "head" for output in plan.outputs):
        config["tie_word_embeddings"] = False


def _with_vocabulary(plan: Plan, config: dict[str, Any]) -> dict[str, Any]:
    """The number of rows wherever the donor's was stated, and token ids of the output's vocabulary."""
    tokens, donor = plan.tokens, plan.inputs.donor
    if tokens is None or tokens.lexicon is None:
        return config
    stated = [(path, section["vocab_size"]) for path, section in sections(config) if "vocab_size" in section]
    same = [path for path, size in stated if size == donor.vocabulary_rows]
    for path in same or [path for path, _ in stated[:1]]:
        _put(config, (*path, "vocab_size"), tokens.rows)
    return tokens.remapped(config, [])


def _put(config: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = value

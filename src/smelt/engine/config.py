"""config.json of the output: the donor's, byte for byte, but for what the merge changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..architecture import role_of
from ..architecture.config import sections
from ..checkpoint.quantisation import without_quantisation
from ..kernels.dtypes import DTYPES, name_of
from .inputs import read_config
from .outputs import Output

if TYPE_CHECKING:
    from .planning import Plan


def patched_configs(plan: Plan) -> dict[str, bytes]:
    """The donor's config.json with dtype, layer count, per-layer lists and tied head as the output has them.

    By name; none when the donor has no config. Those of a model's parts in other folders get the part's dtype.
    """
    donor = plan.inputs.donor.checkpoint
    raw, stored = read_config(donor), donor.side_files
    found = {} if raw is None else {"config.json": _patched(raw, partial(_whole, plan))}
    for part in donor.parts:
        name = part.inside("config.json")
        if part.folder and name in stored:
            outputs = [output for output in plan.outputs if output.name.startswith(part.prefix)]
            found[name] = _patched(stored[name], partial(_of_part, plan, outputs))
    return found


def _patched(raw: bytes, change: Callable[[dict[str, Any]], dict[str, Any]]) -> bytes:
    """The same bytes where nothing is changed."""
    config = json.loads(raw)
    before = json.dumps(config)
    config = change(config)
    if json.dumps(config) == before:
        return raw
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _whole(plan: Plan, config: dict[str, Any]) -> dict[str, Any]:
    _with_dtype(plan, plan.outputs, config)
    _set_layers(plan, config)
    _untie(plan, config)
    if plan.float8 is not None:
        config["quantization_config"] = plan.float8.config()
    return _with_vocabulary(plan, config)


def _of_part(plan: Plan, outputs: Sequence[Output], config: dict[str, Any]) -> dict[str, Any]:
    return _with_dtype(plan, outputs, without_quantisation(config))


def _with_dtype(plan: Plan, outputs: Sequence[Output], config: dict[str, Any]) -> dict[str, Any]:
    """The dtype that most of the outputs' elements have, under the key that the donor uses.

    Configs of transformers get the key where the recipe chooses the dtype; those of other libraries do not know it.
    """
    weights: dict[str, int] = {}
    for output in outputs:
        if DTYPES[output.dtype].arithmetic:
            weights[output.dtype] = weights.get(output.dtype, 0) + output.count
    if not weights:
        return config
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    name = name_of(max(sorted(weights), key=weights.__getitem__))
    if key in config or (plan.recipe.written_dtype is not None and "model_type" in config):
        config[key] = name
    return config


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

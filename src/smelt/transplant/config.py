"""config.json and generation_config.json with the donor's special tokens, and whose files a tokenizer is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..checkpoint.documents import parse_json
from ..engine.inputs import Input
from ..engine.side_files import side_files

_ROLES = ("bos", "eos", "pad", "unk", "mask", "cls", "sep", "decoder_start")
_IDS = tuple(f"{role}_token_id" for role in _ROLES)

#: Side files that do not belong to a tokenizer.
_OTHERS = ("generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
           "feature_extractor_config.json", "processor_config.json")  # fmt: skip


def documents(model: Input, donor: Input, rows: int) -> tuple[dict[str, bytes], list[str]]:
    """The small files of the result by name, and a sentence on each number in the configs that changed.

    The tokenizer is the donor's, the rest the model's.
    """
    ours, theirs = side_files(model.checkpoint), side_files(donor.checkpoint)
    files = {name: data for name, data in ours.items() if name in (*_OTHERS, *model.checkpoint.beside)}
    files |= {name: data for name, data in theirs.items() if name not in (*_OTHERS, *donor.checkpoint.beside)}
    changes: list[str] = []
    said = donor.checkpoint.config
    if model.checkpoint.config:
        config = dict(_nested(model.checkpoint.config, said, rows, changes))
        files["config.json"] = _dumped(config)
    if "generation_config.json" in ours:
        generation = parse_json(ours["generation_config.json"], "generation_config.json")
        there = {**said, **parse_json(theirs.get("generation_config.json", b"{}"), "generation_config.json")}
        files["generation_config.json"] = _dumped({**generation, **_ids(generation, there)})
    return files, changes


def _nested(config: Mapping[str, Any], said: Mapping[str, Any], rows: int, changes: list[str]) -> dict[str, Any]:
    """A config, and those in it, with the new vocabulary; changes are told."""
    new = {**config, **_ids(config, said)}
    if isinstance(config.get("vocab_size"), int):
        new["vocab_size"] = rows
    changes += [f"{key} was {config[key]} and is {new[key]}" for key in config if config[key] != new[key]]
    for key, value in config.items():
        if isinstance(value, Mapping) and isinstance(value.get("vocab_size"), int):
            there = said.get(key)
            new[key] = _nested(value, there if isinstance(there, Mapping) else said, rows, changes)
    return new


def _ids(config: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of special tokens: the donor's; none where the donor names none, for the old id means another token."""
    return {key: said.get(key) for key in _present(config, said)}


def _present(config: Mapping[str, Any], said: Mapping[str, Any]) -> Iterator[str]:
    return (key for key in _IDS if key in config or said.get(key) is not None)


def _dumped(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

"""Tokenizer transplantation, and merges of models with different vocabularies."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

import smelt

from ..case import Arrays, Inputs, Mismatch


def tokenizer_transplant(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    if parameters.get("mode") == "merge_with_tokenizer":
        return merge_with_tokenizer(inputs, parameters)
    options = {{"approximation_method": "method"}.get(name, name): value for name, value in parameters.items()}
    if options["method"] != "common_interpolation":
        options.pop("cosine_similarity", None)
    with tempfile.TemporaryDirectory() as scratch:
        model, donor = (
            model_with_vocabulary(Path(scratch) / str(index), tensors, inputs.case, index)
            for index, tensors in enumerate(inputs.each("model"))
        )
        out = Path(scratch) / "out"
        smelt.transplant_tokenizer(model, donor, out, **options)
        if not smelt.verify(out).ok:
            raise Mismatch("the result does not verify")
        with smelt.load(out) as checkpoint:
            return dict(checkpoint)


def model_with_vocabulary(folder: Path, tensors: Arrays, case: dict[str, Any], index: int) -> Path:
    """Such a model on disk, with a tokenizer that has these words and cuts text at spaces."""
    vocabulary, special = case[f"vocab.{index}"], case.get("special_tokens", {"unk_token": "<unk>"})
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(vocabulary)}))
    added = [{"id": vocabulary[t], "content": t, "special": True, "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False} for t in special.values()]  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": special["unk_token"]},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


#: The case's names for models in recipes.
NAMES = ("A", "B")


def merge_with_tokenizer(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    """The rows of the result by the ids of the case: those of appended tokens are arbitrary."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        for index, (name, arrays) in enumerate(zip(NAMES, inputs.each("model"), strict=True)):
            model_with_vocabulary(Path(name), arrays, inputs.case, index)
        smelt.merge(recipe(parameters), "out", force=True)
        with smelt.load("out") as checkpoint:
            result = {name: checkpoint[name] for name in checkpoint}
        tree = json.loads(Path("out", "tokenizer.json").read_text(encoding="utf-8"))
    ids = {**tree["model"]["vocab"], **{entry["content"]: entry["id"] for entry in tree["added_tokens"]}}
    return {name: array[places(ids, inputs.case["vocab.out"], len(array))] for name, array in result.items()}


def recipe(parameters: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(NAMES, parameters["weights"], strict=True)
    padding = parameters["pad_to_multiple_of"]
    return {
        "merge_method": parameters["merge_method"],
        "base_model": parameters["base"],
        "models": [{"model": name, "parameters": {"weight": weight}} for name, weight in pairs],
        "tokenizer": {**parameters["tokenizer"], **({"pad_to_multiple_of": padding} if padding else {})},
    }


def places(ids: dict[str, int], wanted: dict[str, int], rows: int) -> list[int]:
    """For each row of the case's result the row of ours; rows without a token are in the same place."""
    if ids.keys() != wanted.keys():
        raise Mismatch(f"tokens differ: {sorted(ids.keys() ^ wanted.keys())[:5]}")
    found = list(range(rows))
    for token, index in wanted.items():
        found[index] = ids[token]
    return found


RUNNERS = {"tokenizer_transplant": tokenizer_transplant}

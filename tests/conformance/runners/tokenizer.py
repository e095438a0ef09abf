"""Tokenizer transplantation."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

import smelt

from ..case import Arrays, Inputs, Mismatch


def tokenizer_transplant(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    if "approximation_method" not in parameters:
        raise Mismatch("vocabularies of a merge are not read yet")
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
    vocabulary, special = case[f"vocab.{index}"], case["special_tokens"]
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


RUNNERS = {"tokenizer_transplant": tokenizer_transplant}

"""The files beside the weights: tokenizer, generation settings, preprocessors."""

from __future__ import annotations

import json

from ..checkpoint import Checkpoint
from ..checkpoint.documents import parse_json
from ..tokenizer import FILES, files_in
from .tokens import Tokens

_GENERATION = "generation_config.json"

#: Files that travel with the weights, from the donor. The rest is left behind.
_OTHERS = (
    _GENERATION, "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "feature_extractor_config.json",
)  # fmt: skip


def side_files(donor: Checkpoint, tokens: Tokens | None = None) -> dict[str, bytes]:
    """All of them by name; the tokenizer's as ``tokens`` has them, or else as the donor has them."""
    stored = donor.side_files
    files = files_in(stored, (*_OTHERS, *donor.beside))
    if tokens is None:
        return files | files_in(stored, FILES)
    if _GENERATION in files:
        files[_GENERATION] = _generation(files[_GENERATION], tokens)
    return {**files, **tokens.files}


def _generation(data: bytes, tokens: Tokens) -> bytes:
    """Settings with the ids of the output's vocabulary; the same bytes where they stay."""
    config = parse_json(data, _GENERATION)
    made = tokens.remapped(config, [])
    return data if made == config else (json.dumps(made, indent=2, ensure_ascii=False) + "\n").encode()


def id_notices(donor: Checkpoint, tokens: Tokens) -> list[str]:
    """Token ids in the donor's configs that mean nothing in the output."""
    notices = []
    for name, data in files_in(donor.side_files, ("config.json", _GENERATION)).items():
        lost: list[str] = []
        made = tokens.remapped(parse_json(data, name), lost)
        notices += [f"{name}: {what}" for what in (*lost, *tokens.rowless(made))]
    return notices

"""Tokenizers in merges, from their files as plain JSON: vocabularies, and the tokenizer of the output.

Nothing here reads a weight. ``reading`` tells which token has which id, ``lexicon`` makes the output's
vocabulary from those of the models, ``rows`` says where each row of the output comes from, ``editing`` writes
the vocabulary into the files, ``templates`` and ``identifiers`` see to what refers to tokens.
"""

from __future__ import annotations

from .editing import FILES, edited, with_template
from .identifiers import remapped
from .lexicon import Lexicon, build
from .reading import (
    SLOW_FILES,
    Vocabulary,
    files_in,
    parse_tokenizer,
    parse_vocabulary,
    stored_vocabulary,
    vocabulary_in,
)  # fmt: skip
from .rows import Holder, RowMap, RowRule, map_rows, tokens_by_id
from .templates import check_template, choose_template, strange_tokens

__all__ = [
    "FILES", "SLOW_FILES", "Holder", "Lexicon", "RowMap", "RowRule", "Vocabulary", "build", "check_template",
    "choose_template", "edited", "files_in", "map_rows", "parse_tokenizer", "parse_vocabulary", "remapped",
    "stored_vocabulary", "strange_tokens", "tokens_by_id", "vocabulary_in", "with_template",
]  # fmt: skip

"""Do the models mean the same token by the same id? From the tokenizer files, as plain JSON.

Embedding rows are merged by position. Where two tokenizers give one id to two strings, a merged row is
the mean of two unrelated tokens, and no shape shows it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import storage
from ..checkpoint import Checkpoint
from ..errors import show
from .findings import Finding

#: Files that hold a whole vocabulary; the first one that a folder has counts.
_FILES = ("tokenizer.json", "vocab.json")
_LARGEST_FILE = 1 << 28  # bytes
_EXAMPLES = 3


def compare_vocabularies(checkpoints: Sequence[Checkpoint]) -> list[Finding]:
    """Compare every checkpoint's tokens with those of the first one that has a tokenizer.

    Error ``tokens-differ``: an id of the ordinary vocabulary stands for two strings. Warnings: only added or
    special tokens differ (``special-tokens-differ``), one has more tokens (``vocabulary-sizes-differ``), or a
    file is not of a layout that is known (``tokenizer-unreadable``).
    """
    stored = {checkpoint.label: _content(checkpoint) for checkpoint in checkpoints}
    files = {label: file for label, file in stored.items() if file is not None}
    if len(set(files.values())) < 2:
        return []
    read, found = [], []
    for label, (name, content) in files.items():
        try:
            read.append((label, _Vocabulary(name, content)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            text = f"{show(label)}: {name} is not a tokenizer of a known layout: {show(error, 80)}"
            found.append(Finding("warning", "tokenizer-unreadable", (label,), text))
    for label, vocabulary in read[1:]:
        found += _compare(*read[0], label, vocabulary)
    return found


def _content(checkpoint: Checkpoint) -> tuple[str, bytes] | None:
    """Name and bytes of the file that holds the vocabulary."""
    if checkpoint.folder is None:
        return None
    present = set(storage.listdir(checkpoint.folder))
    for name in _FILES:
        if name in present:
            return name, storage.read_small(Path(checkpoint.folder) / name, _LARGEST_FILE)
    return None


class _Vocabulary:
    """id -> token; ``added`` are the ids that were added to the ordinary vocabulary (special or not)."""

    def __init__(self, name: str, content: bytes) -> None:
        tree = json.loads(content)
        whole = name == "tokenizer.json"
        self.added = {int(token["id"]): str(token["content"]) for token in tree.get("added_tokens", ()) if whole}
        self.tokens = _by_id(tree["model"]["vocab"] if whole else tree) | self.added


def _by_id(vocabulary: Any) -> dict[int, str]:
    """BPE and WordPiece map token -> id, Unigram lists [token, score]."""
    if isinstance(vocabulary, list):
        return {index: str(entry[0]) for index, entry in enumerate(vocabulary)}
    return {int(index): str(token) for token, index in vocabulary.items()}


def _compare(label: str, first: _Vocabulary, other_label: str, other: _Vocabulary) -> list[Finding]:
    shared = first.tokens.keys() & other.tokens.keys()
    different = sorted(index for index in shared if first.tokens[index] != other.tokens[index])
    special = first.added.keys() | other.added.keys()
    ordinary = [index for index in different if index not in special]
    found = []
    if different:
        found.append(_difference(label, first, other_label, other, ordinary or different, bool(ordinary)))
    sizes = (len(first.tokens), len(other.tokens))
    if sizes[0] != sizes[1]:
        text = f"{show(other_label)} has {sizes[1]} tokens, {show(label)} has {sizes[0]}"
        facts = {"tokens": sizes}
        found.append(Finding("warning", "vocabulary-sizes-differ", (other_label, label), text, facts))
    return found


def _difference(
    label: str, first: _Vocabulary, other_label: str, other: _Vocabulary, ids: list[int], ordinary: bool
) -> Finding:
    examples = [(index, first.tokens[index], other.tokens[index]) for index in ids[:_EXAMPLES]]
    listed = ", ".join(f"{index} is {show(a, 40)} and {show(b, 40)}" for index, a, b in examples)
    kind = "tokens" if ordinary else "added tokens"
    text = f"{show(label)} and {show(other_label)} mean different {kind} by {len(ids)} equal ids: {listed}"
    facts = {"ids": len(ids), "examples": [list(example) for example in examples]}
    code = "tokens-differ" if ordinary else "special-tokens-differ"
    return Finding("error" if ordinary else "warning", code, (label, other_label), text, facts)

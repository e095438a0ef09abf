"""Do the models mean the same token by the same id? From the tokenizer files, as plain JSON.

Embedding rows are merged by position. Where two tokenizers give one id to two strings, a merged row is
the mean of two unrelated tokens, and no shape shows it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..checkpoint import Checkpoint
from ..errors import InputRejected, show
from ..tokenizer import Vocabulary, parse_vocabulary, stored_vocabulary
from .findings import Finding

_EXAMPLES = 3


def compare_vocabularies(checkpoints: Sequence[Checkpoint]) -> list[Finding]:
    """Compare every checkpoint's tokens with those of the first one that has a tokenizer.

    Error ``tokens-differ``: an id of the ordinary vocabulary stands for two strings. Warnings: only added or
    special tokens differ (``special-tokens-differ``), one has more tokens (``vocabulary-sizes-differ``), or a
    file is not of a layout that is known (``tokenizer-unreadable``).
    """
    stored = {checkpoint.label: stored_vocabulary(checkpoint.side_files) for checkpoint in checkpoints}
    files = {label: file for label, file in stored.items() if file is not None}
    if len(set(files.values())) < 2:
        return []
    read, found = [], []
    for label, (name, content) in files.items():
        try:
            read.append((label, parse_vocabulary(name, content)))
        except InputRejected as error:
            found.append(Finding("warning", "tokenizer-unreadable", (label,), f"{show(label)}: {error}"))
    for label, vocabulary in read[1:]:
        found += _compare(*read[0], label, vocabulary)
    return found


def _compare(label: str, first: Vocabulary, other_label: str, other: Vocabulary) -> list[Finding]:
    shared = first.tokens.keys() & other.tokens.keys()
    different = sorted(index for index in shared if first.tokens[index] != other.tokens[index])
    special = {vocabulary.ids[token] for vocabulary in (first, other) for token in vocabulary.added}
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
    label: str, first: Vocabulary, other_label: str, other: Vocabulary, ids: list[int], ordinary: bool
) -> Finding:
    examples = [(index, first.tokens[index], other.tokens[index]) for index in ids[:_EXAMPLES]]
    listed = ", ".join(f"{index} is {show(a, 40)} and {show(b, 40)}" for index, a, b in examples)
    kind = "tokens" if ordinary else "added tokens"
    text = f"{show(label)} and {show(other_label)} mean different {kind} by {len(ids)} equal ids: {listed}"
    facts = {"ids": len(ids), "examples": [list(example) for example in examples]}
    code = "tokens-differ" if ordinary else "special-tokens-differ"
    return Finding("error" if ordinary else "warning", code, (label, other_label), text, facts)

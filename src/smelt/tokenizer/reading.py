"""The vocabulary of one tokenizer: ``tokenizer.json``, or the older ``vocab.json``.

The files of slow tokenizers (``tokenizer.model``, ``vocab.txt``, ...) are only ever compared byte by byte.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..checkpoint.documents import brief, parse_json
from ..errors import InputRejected, show

#: Files that hold a whole vocabulary; the first one that a folder has counts.
_FILES = ("tokenizer.json", "vocab.json")

#: Files that hold the vocabulary for slow tokenizers: untrue once ``tokenizer.json`` has changed.
SLOW_FILES = (
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt",
    "added_tokens.json",
)  # fmt: skip

_LARGEST_ID = 10_000_000

_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"\s*+'
#: Merge rules, each a string or a pair of them: most of a large file, and of no use here.
_MERGES = re.compile(rb'"merges"\s*+:\s*+\[\s*+(?:(?:%b|\[\s*+(?:%b,?\s*+)*+\]\s*+),?\s*+)*+\]' % (_STRING, _STRING))


#: The files beside a model's weights, by name.
Files = Mapping[str, bytes]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Which token has which id.

    Attributes
    ----------
    file: what it was read from.
    ids: token -> id, the added tokens included.
    added: token -> its entry in ``added_tokens``; such tokens are found in a text before it is split up.
    extra: those of them that the model's own vocabulary does not have.
    """

    file: str
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    extra: frozenset[str] = frozenset()

    @cached_property
    def tokens(self) -> dict[int, str]:
        """id -> token; where two tokens have one id, the added one."""
        tokens = {index: token for token, index in self.ids.items()}
        return tokens | {self.ids[token]: token for token in self.added}

    @property
    def end(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1

    def within(self, rows: int) -> Vocabulary:
        """Without the tokens that have no row in a matrix of ``rows`` rows."""
        if self.end <= rows:
            return self
        ids = {token: index for token, index in self.ids.items() if index < rows}
        return replace(self, ids=ids, added={token: entry for token, entry in self.added.items() if token in ids})


def stored_vocabulary(files: Files) -> tuple[str, bytes] | None:
    """Name and bytes of the file that holds a model's vocabulary, or None."""
    return next(((name, files[name]) for name in _FILES if name in files), None)


def files_in(files: Files, names: Collection[str]) -> dict[str, bytes]:
    """Those of a model's files that are called one of ``names``."""
    return {name: files[name] for name in names if name in files}


def parse_tokenizer(name: str, content: bytes) -> dict[str, Any]:
    """The object that a tokenizer's file spells, without merge rules. InputRejected when it is no object."""
    return parse_json(_MERGES.sub(b'"merges":[]', content), name)


def parse_vocabulary(name: str, content: bytes) -> Vocabulary:
    """The vocabulary in the bytes of the file ``name``. InputRejected when it is of no known layout."""
    return vocabulary_in(parse_tokenizer(name, content), name)


def vocabulary_in(tree: Mapping[str, Any], name: str) -> Vocabulary:
    """The same for a file that has been read already."""
    whole = name == "tokenizer.json"
    try:
        added = {token["content"]: token for token in tree.get("added_tokens") or () if whole}
        stated = _by_token(tree["model"]["vocab"] if whole else tree)
        extra = frozenset(added.keys() - stated.keys())
        ids = {**stated} | {token: entry["id"] for token, entry in added.items()}
        _check(ids)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputRejected(f"{name} is not a tokenizer of a known layout: {show(error, 80)}") from error
    return Vocabulary(name, ids, added, extra)


def _by_token(vocabulary: Any) -> Mapping[str, Any]:
    """BPE and WordPiece map token -> id, Unigram lists [token, score]."""
    if isinstance(vocabulary, list):
        return {entry[0]: index for index, entry in enumerate(vocabulary)}
    found: Mapping[str, Any] = vocabulary
    return found


def _check(ids: Mapping[str, Any]) -> None:
    """ValueError for what is no token, or no id. In few passes: there may be a million."""
    wrong = [index for index in ids.values() if type(index) is not int or not 0 <= index <= _LARGEST_ID]
    if wrong:
        token = next(token for token, index in ids.items() if index is wrong[0])
        raise ValueError(f"the id of {brief(token)} is {brief(wrong[0])}")
    "".join(ids).encode()  # half a surrogate pair is no token

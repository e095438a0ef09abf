"""The tokens of a model by id, and what they stand for whatever their tokenizer calls it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from ..checkpoint import Checkpoint
from ..checkpoint.documents import parse_json
from ..errors import InputRejected
from ..tokenizer import parse_tokenizer, vocabulary_in

#: How a tokenizer writes words into its tokens: as printable bytes, with a mark before each word, with a mark
#: before all else, or as they are.
Family = Literal["byte level", "sentencepiece", "wordpiece", "plain"]

#: What a token is known by in every vocabulary: ("role", "bos_token"), ("word", "hello") at the beginning of a
#: word, ("", "lo") elsewhere, or its bytes.
Key = tuple[str, str] | bytes

#: The special tokens that are matched by role; earlier ones first where a token has several.
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """``ids``: token -> id. ``roles``: "bos_token" -> token. ``text``: tokenizer.json itself."""

    ids: Mapping[str, int]
    roles: Mapping[str, str]
    family: Family
    text: str = ""

    @property
    def size(self) -> int:
        """How many rows a matrix needs that has one for each id."""
        return max(self.ids.values(), default=-1) + 1

    def keys(self, token: str, by_bytes: bool) -> Iterator[Key]:
        """What a token may be known by, best first."""
        for role in ROLES:
            if self.roles.get(role) == token:
                yield "role", role
        if by_bytes:
            yield self.bytes_of(token)
        else:
            starts, rest = self._split(token)
            yield ("word" if starts else ""), rest

    def _split(self, token: str) -> tuple[bool, str]:
        """Whether the token begins a word, and the rest of it."""
        if self.family == "wordpiece":
            return not token.startswith("##"), token.removeprefix("##")
        mark = {"byte level": "Ġ", "sentencepiece": "▁", "plain": "Ġ"}[self.family]
        return token.startswith(mark), token.removeprefix(mark)

    def bytes_of(self, token: str) -> bytes:
        """The bytes of text that a token stands for; the beginning of a word is a space."""
        if self.family == "byte level" and all(letter in _bytes_of_letters() for letter in token):
            return bytes(_bytes_of_letters()[letter] for letter in token)
        if self.family == "sentencepiece" and (match := _BYTE.fullmatch(token)):
            return bytes.fromhex(match[1])
        starts, rest = self._split(token)
        return (" " * starts + rest.replace("▁", " ")).encode()

    def text_of(self, token: str) -> str:
        return self.bytes_of(token).decode("utf-8", "replace")


@cache
def _bytes_of_letters() -> dict[str, int]:
    """The alphabet of byte-level tokenizers (Radford et al., GPT-2, 2019): printable bytes stand for themselves,
    the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


# --- reading --------------------------------------------------------------------------------------------


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """The vocabulary in a model's tokenizer.json, special tokens as tokenizer_config.json names them.

    Raises InputRejected when there is none, or it is of a layout that is not known.
    """
    files = checkpoint.side_files
    if "tokenizer.json" not in files:
        raise InputRejected(
            f"{checkpoint.label}: no tokenizer.json: save its tokenizer in this form first, with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    raw = files["tokenizer.json"]
    configs = [parse_json(files[n], n) for n in ("special_tokens_map.json", "tokenizer_config.json") if n in files]
    try:
        tree = parse_tokenizer("tokenizer.json", raw)
        ids = vocabulary_in(tree, "tokenizer.json").ids
    except InputRejected as error:
        raise InputRejected(f"{checkpoint.label}: {error}") from error
    return Vocabulary(ids, _roles(configs, ids), _family(tree), raw.decode())


def _roles(configs: list[dict[str, Any]], ids: Mapping[str, int]) -> dict[str, str]:
    found = {}
    for config in configs:
        for role in ROLES:
            given = config.get(role)
            token = given.get("content") if isinstance(given, Mapping) else given
            if isinstance(token, str) and token in ids:
                found[role] = token
    return found


def _family(tree: Mapping[str, Any]) -> Family:
    types = set(_types({key: tree.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}))
    if "ByteLevel" in types:
        return "byte level"
    if types & {"Metaspace", "ByteFallback", "▁"}:
        return "sentencepiece"
    return "wordpiece" if tree["model"].get("type") == "WordPiece" else "plain"


def _types(tree: Any) -> Iterator[str]:
    """Every component's type, and what is replaced by or for the mark of sentencepiece."""
    if isinstance(tree, Mapping):
        yield from (str(tree[key]) for key in ("type", "content") if isinstance(tree.get(key), str))
        if tree.get("type") == "Replace" and "▁" in str(tree.get("pattern")):
            yield "▁"
    for value in tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ():
        yield from _types(value)

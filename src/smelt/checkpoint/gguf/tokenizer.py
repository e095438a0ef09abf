"""The tokenizer in GGUF's metadata as Hugging Face's files: the way back from :mod:`.tokens`.

Done is what can be done exactly, which is as llama.cpp reads the file; all else is refused with a reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ...errors import InputRejected, show
from ..documents import parse_json
from .header import Texts
from .pieces import CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, Piece
from .splits import SPLITS
from .tokens import CHAT_TEMPLATE, SPECIAL, filler

_OWN = "tokenizer.ggml."
_TREE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"

#: The file itself, which some converters keep beside what they make of it.
_WHOLE = "tokenizer.huggingface.json"

_MODELS = ("gpt2", "llama")

#: The control tokens of Phi-3 that leave the spaces behind them alone.
_NOT_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")

#: Letters that are looked at to find merges; a large vocabulary takes a fiftieth of that.
_MOST_WORK = 1 << 30

_Tree = dict[str, Any]
_Metadata = Mapping[str, Any]
_Pieces = dict[int, Piece]


class TokenizerFiles(Mapping[str, bytes]):
    """Name -> bytes of the files, made when one is asked for; none where ``problem`` says why."""

    def __init__(self, metadata: _Metadata) -> None:
        self._metadata = metadata

    @cached_property
    def _made(self) -> tuple[dict[str, bytes], str | None]:
        if f"{_OWN}tokens" not in self._metadata:
            return {}, None
        try:
            return tokenizer_files(self._metadata), None
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            return {}, f"a text of it is not UTF-8: {error.reason}"
        except (ValueError, InputRejected) as error:
            return {}, str(error)

    @property
    def problem(self) -> str | None:
        return self._made[1]

    def __getitem__(self, name: str) -> bytes:
        if name not in (_TREE, _SETTINGS):  # other files are looked for, too
            raise KeyError(name)
        return self._made[0][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made[0])

    def __len__(self) -> int:
        return len(self._made[0])


def tokenizer_files(metadata: _Metadata) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json, which holds the chat templates.

    ValueError, with a reason, where they cannot be made exactly.
    """
    pieces = _pieces(metadata)
    settings = _settings(metadata, pieces)
    whole = metadata.get(_WHOLE)
    if isinstance(whole, str):
        tree = parse_json(whole.encode("utf-8", "surrogateescape"), _WHOLE)
    else:
        tree = _tree(metadata, pieces, settings)
    made = json.dumps(tree, ensure_ascii=False).encode()
    return {_TREE: made, _SETTINGS: (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()}


# --- tokens ---------------------------------------------------------------------------------------------


def _pieces(metadata: _Metadata) -> _Pieces:
    """The tokens by id, without fillers. ValueError where the arrays are not what they should be."""
    texts = _strings(metadata, "tokens")
    kinds = _numbers(metadata, "token_type", len(texts), NORMAL)
    scores = _numbers(metadata, "scores", len(texts), 0.0)
    found = {}
    for index, (text, kind, score) in enumerate(zip(texts, kinds, scores, strict=True)):
        if text and not (kind == UNUSED and text == filler(index)):
            found[index] = Piece(text, score, kind)
    if len({piece.text for piece in found.values()}) < len(found):
        raise ValueError("two tokens have the same text")
    return found


def _strings(metadata: _Metadata, key: str) -> list[str]:
    stated = metadata.get(_OWN + key)
    if not isinstance(stated, Texts):
        raise ValueError(f"{_OWN}{key} is missing, or no list of texts")
    return stated.decoded()


def _numbers(metadata: _Metadata, key: str, count: int, usual: float) -> list[Any]:
    stated = metadata.get(_OWN + key)
    if stated is None:
        return [usual] * count
    if not isinstance(stated, np.ndarray) or len(stated) != count:
        raise ValueError(f"{_OWN}{key} is not one number for each of the {count} tokens")
    found: list[Any] = stated.tolist()
    return found


def _is_added(piece: Piece) -> bool:
    return piece.kind in (CONTROL, USER_DEFINED, UNKNOWN)


def _vocabulary(pieces: _Pieces) -> dict[str, int]:
    """text -> id; what was added behind a vocabulary without gaps stays outside, as libraries have it."""
    last = max((index for index, piece in pieces.items() if not _is_added(piece)), default=-1)
    gapless = len(pieces) == max(pieces, default=-1) + 1
    return {piece.text: index for index, piece in pieces.items() if index <= last or not gapless}


def _added(pieces: _Pieces, *, normalized: bool = False, stripping: bool = False) -> list[_Tree]:
    """Tokens that are found before a text is split.

    ``normalized``: users' own are looked for in what the normalizer leaves; ``stripping``: Phi-3's take the spaces
    behind them.
    """
    return [
        {
            "id": index, "content": piece.text, "single_word": False, "lstrip": False,
            "rstrip": stripping and piece.kind == CONTROL and piece.text not in _NOT_STRIPPING,
            "normalized": normalized and piece.kind == USER_DEFINED, "special": piece.kind != USER_DEFINED,
        }
        for index, piece in pieces.items() if _is_added(piece)
    ]  # fmt: skip


# --- tokenizer.json -------------------------------------------------------------------------------------


def _tree(metadata: _Metadata, pieces: _Pieces, settings: _Tree) -> _Tree:
    model = str(metadata.get(f"{_OWN}model"))
    if model not in _MODELS:
        raise ValueError(f"its model is {show(model)}, understood are {', '.join(_MODELS)}")
    parts = _byte_level(metadata, pieces) if model == "gpt2" else _spaced(metadata, pieces)
    ids = {piece.text: index for index, piece in pieces.items()}
    template = _template(settings, ids)
    return {"version": "1.0", "truncation": None, "padding": None, **parts} | template


def _byte_level(metadata: _Metadata, pieces: _Pieces) -> _Tree:
    pre = str(metadata.get(f"{_OWN}pre"))
    if pre not in SPLITS:
        raise ValueError(f"its pre-tokenizer is {show(pre)}, understood are {', '.join(SPLITS)}")
    vocabulary = _vocabulary(pieces)
    merges = [merge.split(" ") for merge in dict.fromkeys(_strings(metadata, "merges"))]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise ValueError(f"the merge {show(' '.join(merge))} is not of tokens")
    split, steps = SPLITS[pre], SPLITS[pre].steps
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "added_tokens": _added(pieces), "normalizer": split.normalizer,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": level, "decoder": level, "model": _bpe(vocabulary, merges, ignore_merges=split.whole),
    }  # fmt: skip


def _spaced(metadata: _Metadata, pieces: _Pieces) -> _Tree:
    """SentencePiece: spaces are letters, and letters that are unknown are bytes."""
    if metadata.get(f"{_OWN}remove_extra_whitespaces"):
        raise ValueError("it removes spaces, which is not understood")
    family, prefix = str(metadata.get("general.architecture")), metadata.get(f"{_OWN}add_space_prefix", True)
    is_gemma = family.startswith("gemma")
    if is_gemma:
        pieces = _gemma(pieces)
    if not prefix:  # then a space is its letter wherever it is; those of added tokens are true ones
        pieces = {index: piece._replace(text=piece.text.replace(" ", SPACE)) for index, piece in pieces.items()}
    unknown = next((piece.text for piece in pieces.values() if piece.kind == UNKNOWN), None)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    first = {"type": "Prepend", "prepend": SPACE}
    undone = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    merges = _merges(pieces, by_score=not is_gemma)
    return {
        "added_tokens": _added(pieces, normalized=not prefix, stripping=family == "phi3"),
        "normalizer": {"type": "Sequence", "normalizers": [first, space]} if prefix else space,
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [undone, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe(_vocabulary(pieces), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }  # fmt: skip


def _gemma(pieces: _Pieces) -> _Pieces:
    """As its tokenizer.json has them: runs of spaces come from merges, and there is a tab instead of its byte."""
    blank = {index for index, piece in pieces.items() if piece.kind == USER_DEFINED and not piece.text.strip(" ")}
    found = {index: piece._replace(kind=NORMAL) if index in blank else piece for index, piece in pieces.items()}
    texts = {piece.text: index for index, piece in pieces.items()}
    if "<0x09>" in texts and "\t" not in texts:
        found[texts["<0x09>"]] = Piece("\t", 0.0, NORMAL)
    return found


def _merges(pieces: _Pieces, *, by_score: bool) -> list[list[str]]:
    """Every way to make a piece of two others, the best piece first.

    SentencePiece goes by scores. Gemma's tell nothing: its tokenizer has merges in the order of the ids. The order
    of one piece's ways is that in which transformers puts them.
    """
    usable = {piece.text: index for index, piece in pieces.items() if piece.kind in (NORMAL, USER_DEFINED, UNUSED)}
    if sum(len(text) ** 2 for text in usable) > _MOST_WORK:
        raise ValueError("its tokens are too long")
    ranked = []
    for text, index in usable.items():
        rank = -pieces[index].score if by_score else index
        cuts = [cut for cut in range(1, len(text)) if text[:cut] in usable and text[cut:] in usable]
        ranked += [(rank, -cut if by_score else cut, text) for cut in cuts]
    ranked.sort(key=lambda item: item[:2])
    return [[text[: abs(cut)], text[abs(cut) :]] for _, cut, text in ranked]


def _bpe(vocabulary: Mapping[str, int], merges: Sequence[Sequence[str]], **settings: Any) -> _Tree:
    usual = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    more = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **usual, **more, **settings, "vocab": vocabulary, "merges": merges}


def _template(settings: _Tree, ids: Mapping[str, int]) -> _Tree:
    """What is put around a text, and around each of two."""
    marks = {word: settings[f"{word}_token"] for word in ("bos", "eos") if settings[f"add_{word}_token"]}
    if not marks:
        return {}

    def around(text: str, number: int) -> list[_Tree]:
        named = {word: [{"SpecialToken": {"id": mark, "type_id": number}}] for word, mark in marks.items()}
        return [*named.get("bos", []), {"Sequence": {"id": text, "type_id": number}}, *named.get("eos", [])]

    known = {mark: {"id": mark, "ids": [ids[mark]], "tokens": [mark]} for mark in sorted(marks.values())}
    single, pair = around("A", 0), around("A", 0) + around("B", 1)
    step = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}
    return {"post_processor": step}


# --- tokenizer_config.json ------------------------------------------------------------------------------


def _settings(metadata: _Metadata, pieces: _Pieces) -> _Tree:
    named = {}
    for word, own in SPECIAL.items():
        index = metadata.get(f"{_OWN}{own}_token_id")
        if isinstance(index, int) and index in pieces:
            named[f"{word}_token"] = pieces[index].text
    usual = {"add_bos_token": _begins(metadata), "add_eos_token": False}
    adds = {key: bool(metadata.get(_OWN + key, value)) for key, value in usual.items()}
    for key, value in adds.items():
        if value and key.removeprefix("add_") not in named:
            raise ValueError(f"it puts a token around texts that is not named: {key}")
    general = {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    return {**adds, **named, **general, **_chat(metadata)}


def _begins(metadata: _Metadata) -> bool:
    """Whether llama.cpp puts a token before a text, where a file does not say."""
    split = SPLITS.get(str(metadata.get(f"{_OWN}pre")))
    return str(metadata.get(f"{_OWN}model")) == "llama" or (split is not None and split.begins)


def _chat(metadata: _Metadata) -> _Tree:
    """The chat template, or all of them by their names."""
    found = {}
    for key, text in metadata.items():
        _, mark, name = key.partition(CHAT_TEMPLATE)
        if mark and isinstance(text, str) and (not name or name.startswith(".")):
            found[name.removeprefix(".") or "default"] = text
    if found.keys() <= {"default"}:
        return {} if not found else {"chat_template": found["default"]}
    return {"chat_template": [{"name": name, "template": text} for name, text in found.items()]}

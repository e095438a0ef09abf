"""The tokenizer of a model as GGUF's metadata: from tokenizer.model, else from tokenizer.json.

What llama.cpp would split up in another way than the model's own tokenizer is refused: a wrong pre-tokenizer
gives a model that answers, only worse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...errors import InputRejected, show
from ..documents import parse_json
from .format import BOOL, F32, I32, TEXT, U32
from .pieces import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, Piece, read_pieces
from .splits import name_of

#: (key, kind, value or list of values)
Entry = tuple[str, int, Any]
Files = Mapping[str, bytes]

_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0

CHAT_TEMPLATE = "tokenizer.chat_template"

#: Special tokens: the word of tokenizer_config.json, and GGUF's.
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}


def tokenizer_entries(files: Files, config: Mapping[str, Any], rows: int) -> list[Entry]:
    """The metadata of the tokenizer in a model's ``files``, for an embedding of ``rows`` rows.

    Empty when there is no tokenizer. InputRejected when it is of a kind that is not understood.
    """
    tree = _json(files, "tokenizer.json")
    settings = _json(files, "tokenizer_config.json")
    try:
        if "tokenizer.model" in files:
            entries = _sentencepiece(files["tokenizer.model"], _added(tree, settings), rows)
        elif tree:
            entries = _from_json(tree, rows)
        else:
            return []
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputRejected(f"tokenizer.json is not of a known layout: {show(error, 80)}") from error
    except ValueError as error:
        raise InputRejected(f"the tokenizer is not written to GGUF: {error}") from error
    return [*entries, *_special(tree, settings, config), *template_entries(files)]


def _json(files: Files, name: str) -> dict[str, Any]:
    return parse_json(files[name], name) if name in files else {}


# --- vocabularies ---------------------------------------------------------------------------------------


def _from_json(tree: Mapping[str, Any], rows: int) -> list[Entry]:
    model = tree["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"tokenizer.json is a {show(model['type'])} model; BPE and SentencePiece are understood")
    if model.get("byte_fallback"):
        return _like_sentencepiece(tree, rows)
    pre = name_of(tree)
    pieces = {index: Piece(token, 0.0, NORMAL) for token, index in model["vocab"].items()}
    tokens = _completed(pieces, _added(tree, {}), rows)
    merges = [_merge(rule) for rule in model["merges"]]
    return [
        ("tokenizer.ggml.model", TEXT, "gpt2"), ("tokenizer.ggml.pre", TEXT, pre),
        ("tokenizer.ggml.tokens", TEXT, [token.text for token in tokens]),
        ("tokenizer.ggml.token_type", I32, [token.kind for token in tokens]),
        ("tokenizer.ggml.merges", TEXT, merges),
    ]  # fmt: skip


def _merge(rule: str | Sequence[str]) -> str:
    return rule if isinstance(rule, str) else " ".join(part.replace(" ", "\u0120") for part in rule)


def _like_sentencepiece(tree: Mapping[str, Any], rows: int) -> list[Entry]:
    """BPE with bytes to fall back on: SentencePiece merges by score, so a token's is the place of its first merge."""
    model = tree["model"]
    ranks: dict[str, int] = {}
    for place, rule in enumerate(model["merges"]):
        first, second = rule.split(" ") if isinstance(rule, str) else rule
        ranks.setdefault(first + second, place)
    pieces = {}
    for token, index in model["vocab"].items():
        kind = BYTE if _is_byte(token) else UNKNOWN if token == model.get("unk_token") else NORMAL
        score = -float(ranks.get(token, len(ranks))) if kind == NORMAL else 0.0
        pieces[index] = Piece(token, score, kind)
    return _spaced(_completed(pieces, _added(tree, {}), rows), _adds_prefix(tree))


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _adds_prefix(tree: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front. ValueError when spaces are not what SentencePiece makes of them."""
    stated, before = tree.get("normalizer") or {}, tree.get("pre_tokenizer") or {}
    steps = stated.get("normalizers", [stated]) if stated else []
    kinds = [(step.get("type"), step.get("prepend"), step.get("content")) for step in steps]
    prepend, replace = ("Prepend", SPACE, None), ("Replace", None, SPACE)
    if before.get("type") == "Metaspace" and not kinds and before.get("replacement") == SPACE:
        return bool(before.get("prepend_scheme", "always") != "never")
    plain = not before or before.get("type") == "Split"
    if plain and kinds in ([prepend, replace], [replace]):
        return kinds[0] == prepend
    raise ValueError(f"tokenizer.json treats spaces by {show(stated)} and {show(before)}, not as SentencePiece does")


def _sentencepiece(model: bytes, added: Mapping[int, tuple[str, bool]], rows: int) -> list[Entry]:
    pieces, prefix = read_pieces(model)
    return _spaced(_completed(dict(enumerate(pieces)), added, rows), prefix)


def _spaced(tokens: Sequence[Piece], prefix: bool) -> list[Entry]:
    return [
        ("tokenizer.ggml.model", TEXT, "llama"), ("tokenizer.ggml.pre", TEXT, "default"),
        ("tokenizer.ggml.tokens", TEXT, [token.text for token in tokens]),
        ("tokenizer.ggml.scores", F32, [token.score for token in tokens]),
        ("tokenizer.ggml.token_type", I32, [token.kind for token in tokens]),
        ("tokenizer.ggml.add_space_prefix", BOOL, prefix),
    ]  # fmt: skip


def _completed(pieces: Mapping[int, Piece], added: Mapping[int, tuple[str, bool]], rows: int) -> list[Piece]:
    """One token per row of the embedding: the vocabulary, what was added to it, and fillers."""
    found = dict(pieces)
    for index, (text, special) in added.items():
        old = found.get(index)
        if old is not None and old.text == text and old.kind not in (NORMAL, USER_DEFINED):
            continue
        kind = CONTROL if special or _looks_special(text) else USER_DEFINED
        found[index] = Piece(text if kind == CONTROL else text.replace(SPACE, " "), _ADDED_SCORE, kind)
    if max(found, default=0) >= rows:
        raise ValueError(f"a token has the id {max(found)}, the embedding {rows} rows")
    return [found.get(index) or Piece(filler(index), _PADDING_SCORE, UNUSED) for index in range(rows)]


def filler(index: int) -> str:
    """What a row without a token is called."""
    return f"[PAD{index}]"


def _looks_special(text: str) -> bool:
    """What llama.cpp takes for a control token although no file says so."""
    ends = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(first) and text.endswith(last) for first, last in ends
    )


def _added(tree: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """id -> (text, whether it is special) of the added tokens."""
    listed = [(token["id"], token) for token in tree.get("added_tokens") or ()]
    listed += [(int(index), token) for index, token in (settings.get("added_tokens_decoder") or {}).items()]
    return {index: (token["content"], bool(token.get("special"))) for index, token in listed}


# --- what goes with them --------------------------------------------------------------------------------


def _special(tree: Mapping[str, Any], settings: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Entry]:
    """Ids of special tokens, and which of them are put around a text."""
    ids = {text: index for index, (text, _) in _added(tree, settings).items()}
    marks = _marks(tree)
    for word, own in SPECIAL.items():
        stated = settings.get(f"{word}_token")
        text = stated.get("content") if isinstance(stated, Mapping) else stated
        index = ids.get(str(text), config.get(f"{word}_token_id"))
        if isinstance(index, list) and index:
            index = index[0]
        if isinstance(index, int):
            yield f"tokenizer.ggml.{own}_token_id", U32, index
        if word in ("bos", "eos"):
            adds = settings.get(f"add_{word}_token")
            adds = adds if isinstance(adds, bool) else marks.get(word)
            if adds is not None:
                yield f"tokenizer.ggml.add_{word}_token", BOOL, adds


def _marks(tree: Mapping[str, Any]) -> dict[str, bool]:
    """Whether a text begins with the token for that, and ends with one: of what is understood."""
    if not tree:
        return {}
    stated = tree.get("post_processor") or {"type": "ByteLevel"}
    steps = stated.get("processors", [stated])
    if any(step.get("type") not in ("ByteLevel", "TemplateProcessing") for step in steps):
        return {}
    single: list[Any] = next((step["single"] for step in steps if step["type"] == "TemplateProcessing"), [{}])
    return {"bos": "SpecialToken" in single[0], "eos": "SpecialToken" in single[-1]}


def template_entries(files: Files) -> Iterator[Entry]:
    """The chat template, and others by their names."""
    stated = _json(files, "tokenizer_config.json").get("chat_template")
    if stated is None and "chat_template.jinja" in files:
        stated = files["chat_template.jinja"].decode("utf-8", "replace")
    if isinstance(stated, str):
        yield CHAT_TEMPLATE, TEXT, stated
    elif isinstance(stated, list):
        named = {entry["name"]: entry["template"] for entry in stated}
        others = {name: text for name, text in named.items() if name != "default"}
        if "default" in named:
            yield CHAT_TEMPLATE, TEXT, named["default"]
        if others:
            yield f"{CHAT_TEMPLATE}s", TEXT, list(others)
        yield from ((f"{CHAT_TEMPLATE}.{name}", TEXT, text) for name, text in others.items())

"""The files of the output's tokenizer: the donor's, edited as JSON where the vocabulary or the template differs."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Set
from typing import Any

from ..checkpoint.documents import parse_json
from ..errors import InputRejected, show
from .lexicon import Lexicon
from .reading import SLOW_FILES, Files, Vocabulary, parse_vocabulary

_TEMPLATE, _OLD_TEMPLATE, _CONFIG = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"

#: All files of a tokenizer: they travel together.
FILES = ("tokenizer.json", _CONFIG, "special_tokens_map.json", _TEMPLATE, _OLD_TEMPLATE, *SLOW_FILES)

#: The beginning of a list of added tokens at the top level, as the tokenizers library writes it.
_ADDED = re.compile(r'^  "added_tokens":\s*(?=\[)|(?<=^\{)"added_tokens":\s*(?=\[)', re.MULTILINE)


def edited(files: Files, donor: Vocabulary, lexicon: Lexicon) -> dict[str, bytes]:
    """The files of the ``donor``'s tokenizer with the vocabulary of the output.

    The bytes depend on the inputs alone; of tokenizer.json only the list of added tokens is written anew, unless a
    token must leave the vocabulary. Raises InputRejected when the file cannot hold the vocabulary: the tokenizers
    library numbers added tokens itself, from the size of the vocabulary on.
    """
    if not lexicon.is_changed:
        return dict(files)
    entries = {token: entry for token, entry in donor.added.items() if token not in lexicon.removed}
    entries |= {entry["content"]: _in_order(entry) for entry in lexicon.added}
    added = sorted(entries.values(), key=lambda entry: int(entry["id"]))
    changed = {name: data for name, data in files.items() if name not in SLOW_FILES}
    changed["tokenizer.json"] = _tokenizer(files["tokenizer.json"], donor, lexicon.removed, added)
    if _CONFIG in files:
        changed[_CONFIG] = _config(files[_CONFIG], added)
    _check(parse_vocabulary("tokenizer.json", changed["tokenizer.json"]), lexicon)
    return changed


def _tokenizer(data: bytes, donor: Vocabulary, removed: Set[str], added: list[Any]) -> bytes:
    """tokenizer.json with another list of added tokens, all else as it stands where nothing else changes."""
    text = data.decode()
    place = _ADDED.search(text)
    if place is not None and removed <= donor.extra:
        _, end = json.JSONDecoder().raw_decode(text, place.end())
        listed = json.dumps(added, indent=2, ensure_ascii=False).replace("\n", "\n  ")
        return (text[: place.end()] + listed + text[end:]).encode()
    tree = parse_json(data, "tokenizer.json")
    _remove(tree["model"], removed)
    return _written({**tree, "added_tokens": added})


def _in_order(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": entry["id"], "content": entry["content"], **entry}


def _remove(model: dict[str, Any], removed: Collection[str]) -> None:
    """Tokens, and the merges that make or use them."""
    if not removed:
        return
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = [entry for entry in vocabulary if entry[0] not in removed]
        return
    model["vocab"] = {token: index for token, index in vocabulary.items() if token not in removed}
    if "merges" in model:
        pairs = ((merge, *(merge.split(" ", 1) if isinstance(merge, str) else merge)) for merge in model["merges"])
        model["merges"] = [merge for merge, a, b in pairs if not {a, b, a + b} & set(removed)]


def _config(data: bytes, added: list[Any]) -> bytes:
    """tokenizer_config.json, which may repeat the added tokens by id."""
    config = parse_json(data, _CONFIG)
    if "added_tokens_decoder" not in config:
        return data
    config["added_tokens_decoder"] = {
        str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in added
    }
    return _written(config)


def _check(written: Vocabulary, lexicon: Lexicon) -> None:
    """What was written must be read as what was meant, by us and by the tokenizers library."""
    new = sorted(written.extra, key=lambda token: written.ids[token])
    first = len(written.ids) - len(new)
    loaded = {token: first + place for place, token in enumerate(new)}
    wrong = [token for token, index in lexicon.ids.items() if loaded.get(token, written.ids.get(token)) != index]
    if wrong or len(written.ids) != len(lexicon.ids):
        token = wrong[0] if wrong else ""
        raise InputRejected(
            f"tokenizer.json leaves ids unused, or gives one twice: {show(token)} would not be read as "
            f"{lexicon.ids.get(token)}, so no token can be added to it or taken from it"
        )


def with_template(files: Files, template: str) -> dict[str, bytes]:
    """The files with another chat template, in the places where the donor keeps its own."""
    changed = {name: data for name, data in files.items() if name != _OLD_TEMPLATE}
    config = parse_json(files[_CONFIG], _CONFIG) if _CONFIG in files else {}
    if "chat_template" in config:
        changed[_CONFIG] = _written({**config, "chat_template": template})
    if _TEMPLATE in files or "chat_template" not in config:
        changed[_TEMPLATE] = template.encode()
    return changed


def _written(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()

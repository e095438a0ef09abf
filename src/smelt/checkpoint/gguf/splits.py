"""How texts are split before tokens are merged: what llama.cpp has names for, and tokenizer.json steps.

GGUF holds a name alone. Listed are those whose regular expressions and normalizer are published with the tokenizer
that the name was made for; a wrong one gives a model that answers, only worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import show

_LETTERS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MARKED = _LETTERS.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

_DIGIT, _THREE = r"\p{N}", r"\p{N}{1,3}"

_NFC = {"type": "NFC"}


@dataclass(frozen=True)
class Split:
    """``patterns``: regular expressions whose matches stand alone, one after the other; none: those of GPT-2.

    ``digits``: every digit stands alone, before that. ``composed``: texts are brought to the normal form NFC first.
    ``whole``: what is a token as it stands is not built by merges. ``begins``: texts begin with the token for that,
    where a file does not say.
    """

    patterns: tuple[str, ...] = ()
    digits: bool = False
    composed: bool = False
    whole: bool = False
    begins: bool = False

    @property
    def normalizer(self) -> dict[str, Any] | None:
        return _NFC if self.composed else None

    @property
    def steps(self) -> list[dict[str, Any]]:
        """As tokenizer.json has them."""
        splits = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in self.patterns
        ]
        digits = [{"type": "Digits", "individual_digits": True}] if self.digits else []
        last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not self.patterns}
        return [*digits, *splits, last]


_LLAMA = Split((_LETTERS % _THREE,), whole=True, begins=True)
_QWEN = Split((_LETTERS % _DIGIT,), composed=True)
_CASES = Split((_CASED % (_ENDINGS, _ENDINGS, _THREE),))

#: By llama.cpp's name; the first of several alike is the one that is written.
SPLITS = {
    "gpt-2": Split(), "phi-2": Split(),
    "llama-bpe": _LLAMA, "llama3": _LLAMA, "llama-v3": _LLAMA, "dbrx": Split((_LETTERS % _THREE,)),
    "qwen2": _QWEN, "deepseek-r1-qwen": Split(_QWEN.patterns), "stablelm2": _QWEN,
    "qwen35": Split((_MARKED % _DIGIT,), composed=True),
    "tekken": Split((_CASED % ("", "", _DIGIT),), whole=True, begins=True),
    "gpt-4o": _CASES, "llama4": _CASES,
    "smollm": Split(digits=True), "starcoder": Split(digits=True), "refact": Split(digits=True),
    "command-r": Split(digits=True, composed=True),
}  # fmt: skip


def name_of(tree: Mapping[str, Any]) -> str:
    """What llama.cpp calls the way in which a tokenizer.json splits texts, told by its content. ValueError: nothing."""
    normal = tree.get("normalizer")
    if normal not in (None, _NFC, {"type": "Sequence", "normalizers": []}):
        raise ValueError(f"tokenizer.json has the normalizer {show(normal)}, expected none or NFC")
    stated = tree.get("pre_tokenizer") or {}
    steps = stated["pretokenizers"] if stated.get("type") == "Sequence" else [stated]
    plain = [_plain(step) for step in steps]
    alike = [name for name, split in SPLITS.items() if plain == [_plain(step) for step in split.steps]]
    if alike:
        composed = normal == _NFC
        return next((name for name in alike if SPLITS[name].composed == composed), alike[0])
    raise ValueError(
        f"tokenizer.json has the pre-tokenizer {show(stated)}; understood are those of {', '.join(SPLITS)}"
    )


def _plain(step: Mapping[str, Any]) -> tuple[Any, ...]:
    """What matters of a step, defaults filled in."""
    if step.get("type") == "Split":
        return ("Split", step["pattern"].get("Regex"), step.get("behavior"), bool(step.get("invert")))
    if step.get("type") == "ByteLevel":
        return ("ByteLevel", bool(step.get("add_prefix_space")), step.get("use_regex", True))
    return (step.get("type"), step.get("individual_digits"))

"""JSON that nobody vouches for: its bounds, each met and passed by one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import smelt
from smelt.checkpoint import documents
from smelt.checkpoint.documents import MAX_DEPTH, parse_json, read_json


def nested(depth: int, opening: str) -> bytes:
    """An object that holds lists, objects, or both in turn, so many levels deep in all."""
    opened = ("{" + (opening * depth))[:depth]
    closing = "".join("}" if mark == "{" else "]" for mark in reversed(opened))
    inside = "".join(mark + '"k":' if mark == "{" else mark for mark in opened)
    return f"{inside}0{closing}".encode()


@pytest.mark.parametrize("opening", ["[", "{", "[{"])
def test_the_depth_is_bounded(opening: str) -> None:
    assert parse_json(nested(MAX_DEPTH, opening), "f").keys() == {"k"}
    with pytest.raises(smelt.InputRejected, match=r"^f is nested 65 levels deep, at most 64 are accepted$"):
        parse_json(nested(MAX_DEPTH + 1, opening), "f")


def test_what_lies_side_by_side_or_in_text_is_not_deep() -> None:
    wide = {"k": [[[]], {}] * 100, '[["{\\': '[[[[\\"{{' * 50, "\\": "]" * 100}
    assert parse_json(json.dumps(wide).encode(), "f") == wide
    luck = random.Random(0)
    for _ in range(200):
        text = "".join(luck.choices('[]{}"\\a\n', k=100))
        assert parse_json(json.dumps({"k": text}).encode(), "f") == {"k": text}


@pytest.mark.parametrize(("mark", "within"), [(",", b'{"k":[0,0,0]}'), (":", b'{"k":0,"l":0}'), ("[", b'{"k":[[0]]}'),
                                              ("{", b'{"k":{}}')])  # fmt: skip
def test_the_number_of_values_is_bounded(mark: str, within: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = dict.fromkeys(documents._MAX_MARKS, 10) | {mark.encode(): 2}
    monkeypatch.setattr(documents, "_MAX_MARKS", limits)
    assert parse_json(within, "f").keys() <= {"k", "l"}
    with pytest.raises(smelt.InputRejected, match=f"^f holds 3 times '\\{mark}', at most 2 are accepted$"):
        parse_json(within.replace(b"0", json.dumps(mark).encode(), 1) if b"0" in within else b'{"k":{},"{":0}', "f")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"k": "\xff"}', r"f is not UTF-8 text: invalid start byte at byte 7"),
        (b'{"k": }', r"f is not valid JSON: Expecting value: line 1 column 7 \(char 6\)"),
        (b'{"a": {"k": 1, "l": 2, "k": 3}}', r"f: the key 'k' is given twice"),
        (b"[1]", r"f holds \[1\], expected an object"),
        (b'"a\\nb"', r"f holds 'a\\nb', expected an object"),
    ],
)
def test_what_is_wrong_is_said(raw: bytes, message: str) -> None:
    with pytest.raises(smelt.InputRejected, match=f"^{message}$"):
        parse_json(raw, "f")


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b'{"k": NaN}')
    monkeypatch.setattr(documents, "MAX_BYTES", 10)
    assert read_json(tmp_path / "f").keys() == {"k"}
    monkeypatch.setattr(documents, "MAX_BYTES", 9)
    with pytest.raises(smelt.InputRejected, match=r"f' has 10 bytes, at most 9 are accepted"):
        read_json(tmp_path / "f")

"""Small changes of a file by chance: of its bytes, of the words of its format, or of the values that it spells."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import yaml

#: What is put in: marks of the formats, numbers at the edges, names that mean something.
WORDS = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"0", b"1e999", b"null", b"true", b"9223372036854775808",
         b'"dtype"', b'"shape"', b'"data_offsets"', b'"F32"', b'"F4"', b"../", b"\\u0000", b"\\ud800", b"\xff", b"\n",
         b"- ", b"!!", b"&a ", b"*a", b"<<: ", b"models:", b"'", b"|", b"---\n", b"\0\0\0\0", b"\1\0\0\0\0\0\0\0",
         b"\xff\xff\xff\xff\xff\xff\xff\x7f"]  # fmt: skip

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 255, 256, 2**31, 2**32, 2**53, 2**63 - 1, 2**64, 10**30, 0.0, -0.0, 0.5,
    1.5, 1e-9, 1e308, float("nan"), float("inf"), "", "a", "x" * 300, "*", ".*", "(a+)+", "[", "\0", "\x1b[2J", "../a",
    "é", "\ud800", "F32", "F8_E4M3", "U8", "int", "auto", [], [0], [1, 2], [[]], [None], {}, {"a": 1}, {"": {}},
]  # fmt: skip


@dataclass(frozen=True)
class Form:
    """How the values that a file spells are read from it, and written in their place."""

    read: Callable[[bytes], Any]
    write: Callable[[bytes, Any], bytes]


JSON = Form(json.loads, lambda _, tree: json.dumps(tree).encode())
YAML = Form(
    lambda content: list(yaml.safe_load_all(content)),
    lambda _, trees: b"\n---\n".join(json.dumps(tree).encode() for tree in trees),
)
HEADER = Form(
    lambda content: json.loads(content[8 : _end(content)]),
    lambda content, tree: relength(bytes(8) + json.dumps(tree).encode() + content[_end(content) :]),
)


def mutated(seed: bytes, luck: random.Random, form: Form | None = None) -> bytes:
    """A file with a few changes, half of the times in its values where it has a form that still holds."""
    if form is not None and luck.random() < 0.5:
        try:
            return form.write(seed, revalued(form.read(seed), luck))
        except (ValueError, TypeError, RecursionError, struct.error, yaml.YAMLError):
            pass
    return respelt(seed, luck)


def respelt(seed: bytes, luck: random.Random) -> bytes:
    """A few small changes: bits, words, pieces that are taken out, doubled or moved."""
    data = bytearray(seed)
    for _ in range(luck.choice((1, 1, 1, 2, 4))):
        at = luck.randint(0, len(data))
        end = min(len(data), at + luck.randint(1, 20))
        kind = luck.randrange(5)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << luck.randrange(8)
        elif kind == 1:
            data[at:at] = luck.choice(WORDS)
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end]
        else:
            data[at:end] = luck.choice(WORDS)
    return bytes(data)


def revalued(tree: Any, luck: random.Random) -> Any:
    """One or two values somewhere in the tree are others, or gone, or there twice."""
    tree = deepcopy(tree)
    for _ in range(luck.choice((1, 1, 2))):
        holders = list(_holders(tree))
        if not holders:
            return luck.choice(VALUES)
        holder = luck.choice(holders)
        places = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        place, kind = luck.choice(places), luck.randrange(6)
        if kind == 0:
            del holder[place]
        elif kind == 1 and isinstance(holder, dict):
            holder[luck.choice(["a", "", *places, f"{place}.x", luck.choice(VALUES)]) or ""] = holder.pop(place)
        elif kind == 2:
            other = luck.choice(holders)
            holder[place] = deepcopy(luck.choice(list(other.values() if isinstance(other, dict) else other)))
        elif kind == 3 and isinstance(holder, list):
            holder.insert(place, deepcopy(holder[place]))
        else:
            holder[place] = _near(holder[place], luck)
    return tree


def _near(value: Any, luck: random.Random) -> Any:
    """Another number beside a number, now and then; else anything."""
    if type(value) is int and luck.random() < 0.5:
        return luck.choice((value + 1, value - 1, value * 2, value // 2, -value, float(value), str(value)))
    return deepcopy(luck.choice(VALUES))


def _holders(tree: Any) -> list[Any]:
    """Every object and list in a tree that is not empty."""
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [*([tree] if inner else []), *(holder for value in inner for holder in _holders(value))]


def relength(content: bytes) -> bytes:
    """A safetensors file whose header ends where its last brace is: what was changed in it is then looked at."""
    end = content.rfind(b"}") + 1
    return struct.pack("<Q", end - 8) + content[8:] if end > 8 else content


def _end(content: bytes) -> int:
    """Where the header of a safetensors file ends."""
    return 8 + int(struct.unpack("<Q", content[:8])[0])

"""Generators of bad files and folders, each of which must be refused in one clear line.

The table :data:`ATTACKS` says how: exit code, what the message must match, and which names must be in it.
Nothing is stored; everything is made when a test asks for it.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Maker = Callable[[Path], Path]


@dataclass(frozen=True)
class Attack:
    """``make(folder)`` writes the bad input into an empty folder and returns what to load."""

    name: str
    make: Maker
    pattern: str
    mentions: tuple[str, ...]
    exit_code: int = 3
    options: tuple[str, ...] = ()  # of the command


ATTACKS: list[Attack] = []


def attack(name: str, pattern: str, *mentions: str, exit_code: int = 3) -> Callable[[Maker], Maker]:
    """Enter a generator into the table."""

    def enter(make: Maker) -> Maker:
        ATTACKS.append(Attack(name, make, pattern, mentions, exit_code))
        return make

    return enter


# --- building blocks ------------------------------------------------------------------------------------

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def entry(dtype: object = "F32", shape: object = (2,), begin: object = 0, end: object = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def packed(header: bytes | Mapping[str, Any], data: bytes = b"") -> bytes:
    """A file's bytes: length, header, data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def good(*names: str) -> bytes:
    """A valid file of one F32 pair per name."""
    entries = {name: entry(begin=8 * i, end=8 * i + 8) for i, name in enumerate(names)}
    return packed(entries, bytes(8 * len(names)))


def put(folder: Path, content: bytes, name: str = FILE) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def spelt(text: str, data: bytes = bytes(8)) -> Maker:
    """A file with this header, character by character."""
    return lambda folder: put(folder, packed(text.encode("utf-8", "surrogatepass"), data))


def tensor(data: bytes = bytes(8), **fields: object) -> Maker:
    """A file whose only tensor ``w`` has these fields instead of the right ones."""
    return lambda folder: put(folder, packed({"w": {**entry(), **fields}}, data))


def lacking(field: str) -> Maker:
    return lambda folder: put(folder, packed({"w": {k: v for k, v in entry().items() if k != field}}, bytes(8)))


def several(data: int, **entries: dict[str, Any]) -> Maker:
    return lambda folder: put(folder, packed(entries, bytes(data)))


def named(name: str) -> Maker:
    return lambda folder: put(folder, packed({name: entry()}, bytes(8)))


def raw(content: bytes) -> Maker:
    return lambda folder: put(folder, content)


def holding(files: Mapping[str, bytes]) -> Maker:
    """A folder with these files."""

    def make(folder: Path) -> Path:
        for name, content in files.items():
            put(folder, content, name)
        return folder

    return make


def indexed(weight_map: object, files: Mapping[str, bytes]) -> Maker:
    """A folder with these files and an index of this map."""
    return spelt_index(json.dumps({"metadata": {}, "weight_map": weight_map}), files)


def spelt_index(text: str, files: Mapping[str, bytes] | None = None) -> Maker:
    return holding({**(files or {}), INDEX: text.encode()})


# --- A: one safetensors file ----------------------------------------------------------------------------

GOOD_ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'

attack("A01-empty", "is empty", FILE)(raw(b""))
attack("A02-seven-bytes", "7 bytes", FILE)(raw(bytes(7)))
attack("A03-no-header", "header of 0 bytes", FILE)(raw(bytes(8)))
attack("A04-header-beyond-file", "cut short", FILE)(raw(struct.pack("<Q", 100) + b"{}"))
attack("A05-largest-length", "18446744073709551615 bytes", FILE)(raw(b"\xff" * 8 + b"{}"))
attack("A06-declared-too-large", "at most 100000000", FILE)(raw(struct.pack("<Q", 100_000_001) + b"{}"))
attack("A08-not-json", "not valid JSON", FILE)(spelt("{'w': 1}"))
attack("A08-binary", r"begins with .*expected", FILE)(raw(struct.pack("<Q", 64) + bytes(range(200, 200 + 50)) * 2))
attack("A09-not-utf-8", "not UTF-8", FILE)(raw(packed(b'{"\xff\xfe":1}')))
attack("A09-half-a-surrogate", "cannot be printed", FILE)(spelt('{"\\ud800":' + GOOD_ENTRY + "}"))
attack("A10-list", "expected '{'", FILE)(spelt("[1, 2]"))
attack("A11-garbage-behind-json", "not valid JSON.*Extra data", FILE)(spelt('{"w":' + GOOD_ENTRY + "} x"))
attack("A12-nul-padding", "not valid JSON", FILE)(spelt('{"w":' + GOOD_ENTRY + "}\0\0\0"))
attack("A13-name-twice", "'w' is given twice", FILE)(spelt('{"w":' + GOOD_ENTRY + ',"w":' + GOOD_ENTRY + "}"))
attack("A13-field-twice", "'dtype' is given twice", FILE)(
    spelt('{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}')
)
attack("A14-metadata-twice", "'__metadata__' is given twice", FILE)(
    spelt('{"__metadata__":{},"__metadata__":{},"w":' + GOOD_ENTRY + "}")
)
attack("A15-metadata-number", "'a' to 1, expected a string", FILE)(
    spelt('{"__metadata__":{"a":1},"w":' + GOOD_ENTRY + "}")
)
attack("A15-metadata-nested", "expected a string", FILE)(spelt('{"__metadata__":{"a":{}},"w":' + GOOD_ENTRY + "}"))
attack("A15-metadata-list", "__metadata__ is .*expected an object", FILE)(
    spelt('{"__metadata__":[],"w":' + GOOD_ENTRY + "}")
)
attack("A15-metadata-surrogate", "surrogate", FILE)(spelt('{"__metadata__":{"a":"\\udc00"},"w":' + GOOD_ENTRY + "}"))
attack("A16-unknown-dtype", "unknown dtype 'F31'", FILE, "'w'")(tensor(dtype="F31"))
attack("A16-dtype-list", "unknown dtype", FILE, "'w'")(tensor(dtype=["F32"]))
attack("A17-lower-case-dtype", "unknown dtype 'f32'", FILE, "'w'")(tensor(dtype="f32"))
attack("A18-no-dtype", "lacks dtype", FILE, "'w'")(lacking("dtype"))
attack("A18-no-shape", "lacks shape", FILE, "'w'")(lacking("shape"))
attack("A18-no-offsets", "lacks data_offsets", FILE, "'w'")(lacking("data_offsets"))
attack("A18-no-entry", "expected an object", FILE, "'w'")(spelt('{"w":"F32"}'))
attack("A19-unknown-field-no-unicode", "surrogate", FILE, "'w'")(spelt('{"w":{"x":"\\ud800",' + GOOD_ENTRY[1:] + "}"))
attack("A19-unknown-field-overflows", "not JSON compliant", FILE, "'w'")(
    spelt('{"w":{"x":1e999,' + GOOD_ENTRY[1:] + "}")
)
attack("A20-negative-size", "expected a list of whole numbers", FILE, "'w'")(tensor(shape=[-2]))
attack("A20-negative-zero", "expected a list of whole numbers", FILE, "'w'")(
    spelt('{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b"")
)
attack("A21-fractional-size", "expected a list of whole numbers", FILE, "'w'")(tensor(shape=[2.0]))
attack("A21-exponent", "expected a list of whole numbers", FILE, "'w'")(
    spelt('{"w":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}')
)
attack("A21-truth-value", "expected a list of whole numbers", FILE, "'w'")(tensor(shape=[True]))
attack("A21-not-a-number", "NaN is no JSON number", FILE)(tensor(shape=[float("nan")]))
attack("A21-endless-number", "expected a list of whole numbers", FILE, "'w'")(
    spelt('{"w":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,8]}}')
)
attack("A21-shape-no-list", "expected a list of whole numbers", FILE, "'w'")(tensor(shape="2"))
attack("A22-overflow", "overflows", FILE, "'w'")(tensor(shape=[1 << 32, 1 << 32]))
attack("A22-overflow-to-the-right-size", "overflows", FILE, "'w'")(tensor(shape=[(1 << 62) + 1, 2]))
attack("A23-zero-times-huge", "overflows", FILE, "'w'")(tensor(b"", shape=[0, 1 << 40, 1 << 40], data_offsets=[0, 0]))
attack("A24-rank", "70 dimensions", FILE, "'w'")(tensor(bytes(4), shape=[1] * 70, data_offsets=[0, 4]))
attack("A25-negative-offset", "expected a list of whole numbers", FILE, "'w'")(tensor(data_offsets=[-8, 0]))
attack("A26-end-before-begin", r"expected \[begin, end\]", FILE, "'w'")(tensor(data_offsets=[8, 0]))
attack("A26-three-offsets", r"expected \[begin, end\]", FILE, "'w'")(tensor(data_offsets=[0, 8, 16]))
attack("A27-beyond-file", "cut short", FILE, "'w'")(tensor(bytes(4)))
attack("A28-polyglot", "3 bytes follow the last tensor", FILE)(tensor(bytes(8) + b"PK\x03"))
attack("A29-hole", "hole of 8 bytes", FILE, "'b'")(several(24, a=entry(), b=entry(begin=16, end=24)))
attack("A29-hole-at-the-start", "hole of 8 bytes", FILE, "'a'")(several(16, a=entry(begin=8, end=16)))
attack("A30-overlap", "shares 4 bytes", FILE, "'b'")(several(12, a=entry(), b=entry(begin=4, end=12)))
attack("A31-one-range-twice", "shares 8 bytes", FILE, "'b'")(several(8, a=entry(), b=entry()))
attack("A32-too-few-bytes", "takes 8 bytes, expected 12", FILE, "'w'")(tensor(shape=[3]))
attack("A32-too-many-bytes", "takes 8 bytes, expected 4", FILE, "'w'")(tensor(shape=[]))
attack("A33-half-a-byte", "do not fill whole bytes", FILE, "'w'")(
    tensor(bytes(2), dtype="F4", shape=[3], data_offsets=[0, 2])
)
attack("A34-deep-lists", "levels deep", FILE)(spelt('{"w":' + "[" * 100_000 + "]" * 100_000 + "}"))
attack("A34-deep-objects", "levels deep", FILE)(spelt('{"w":' * 100_000 + "1" + "}" * 100_000))
attack("A34-deep-and-open", "levels deep", FILE)(spelt('{"w":' + '["]",' * 100_000))
attack("A35-a-list-of-junk", "at most", FILE)(spelt('{"w":[' + "[]," * 4_000_000 + "0]}"))
attack("A36-no-name", "bad name: it is empty", FILE)(named(""))
attack("A37-newline", "cannot be printed", FILE, r"'a\nb'")(named("a\nb"))
attack("A37-nul", "cannot be printed", FILE, r"'a\x00b'")(named("a\0b"))
attack("A37-terminal-escape", "cannot be printed", FILE, r"'\x1b[2J'")(named("\x1b[2J"))
attack("A37-right-to-left", "cannot be printed", FILE, r"\u202e")(named("a\u202eb"))
attack("A38-long-name", "5000 bytes, at most 4096", FILE)(named("n" * 5000))
attack("A38-long-in-bytes", "bytes, at most 4096", FILE)(named("é" * 3000))


@attack("A07-really-too-large", "at most 100000000", FILE)
def _really_large(folder: Path) -> Path:
    path = put(folder, struct.pack("<Q", 100_000_001) + b"{")
    os.truncate(path, 100_000_100)
    return path


@attack("A35-a-million-tensors", "more than 1000000 tensors", FILE)
def _million(folder: Path) -> Path:
    entries = (b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_000_001))
    return put(folder, packed(b"{" + b",".join(entries) + b"}"))


@attack("A40-pipe", "not a regular file", FILE)
def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / FILE)
    return folder / FILE


@attack("A40-socket", "not a regular file", FILE)
def _socket(folder: Path) -> Path:
    before = Path.cwd()
    os.chdir(folder)  # the path of a socket may have 108 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(FILE)
    finally:
        os.chdir(before)
    return folder / FILE


@attack("A40-device", "not a regular file", FILE)
def _device(folder: Path) -> Path:
    (folder / FILE).symlink_to("/dev/zero")
    return folder / FILE


@attack("A40-folder", "not a regular file", FILE)
def _folder(folder: Path) -> Path:
    (folder / FILE).mkdir()
    return folder


@attack("A40-no-such-file", "no such file or folder; did you mean 'model.safetensors'", "modle.safetensors")
def _absent(folder: Path) -> Path:
    put(folder, good("w"))
    return folder / "modle.safetensors"


# --- B: index and folder --------------------------------------------------------------------------------

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PAIR = {ONE: good("a"), TWO: good("b")}


def pointing_at(file: str) -> Maker:
    return indexed({"a": file}, files=PAIR)


attack("B43-index-not-json", "not valid JSON", INDEX)(spelt_index("{", PAIR))
attack("B43-index-deep", "levels deep", INDEX)(spelt_index('{"weight_map":' * 1000 + "1" + "}" * 1000))
attack("B43-index-list", "expected an object", INDEX)(spelt_index("[]"))
attack("B44-no-map", "weight_map is None", INDEX)(spelt_index("{}", PAIR))
attack("B44-map-list", "weight_map is .*expected an object", INDEX)(indexed(["a"], PAIR))
attack("B44-map-empty", "weight_map is {}", INDEX)(indexed({}, PAIR))
attack("B44-number", "'a' to 1, expected the name of a file", INDEX)(indexed({"a": 1}, PAIR))
attack("B45-parent", "plain name", INDEX, "'../secret.safetensors'")(pointing_at("../secret.safetensors"))
attack("B45-parent-itself", "plain name", INDEX, "'..'")(pointing_at(".."))
attack("B46-absolute", "plain name", INDEX)(pointing_at("/etc/a.safetensors"))
attack("B46-drive", "plain name", INDEX)(pointing_at("C:\\a.safetensors"))
attack("B46-drive-relative", "plain name", INDEX)(pointing_at("C:a.safetensors"))
attack("B46-share", "plain name", INDEX)(pointing_at("\\\\host\\share\\a.safetensors"))
attack("B46-url", "plain name", INDEX)(pointing_at("file:///a.safetensors"))
attack("B47-separator", "plain name", INDEX)(pointing_at("sub/a.safetensors"))
attack("B48-nul", "plain name", INDEX)(pointing_at("a\0.safetensors"))
attack("B48-newline", "plain name", INDEX)(pointing_at("a\n.safetensors"))
attack("B49-shard-missing", "1 of its weight files are missing", TWO)(indexed({"a": ONE, "b": TWO}, {ONE: good("a")}))
attack("B50-not-in-its-shard", "'c' is in the index but not in", TWO)(indexed({"a": ONE, "b": TWO, "c": TWO}, PAIR))
attack("B50-in-the-other-shard", "the index says", ONE, TWO, "'b'")(
    indexed({"a": ONE, "b": ONE, "c": TWO}, {ONE: good("a"), TWO: good("b", "c")})
)
attack("B51-unlisted", "'c' is in .*but not in the index", TWO)(
    indexed({"a": ONE, "b": TWO}, {ONE: good("a"), TWO: good("b", "c")})
)
attack("B52-in-two-shards", "'a' is in .* and again in", ONE, TWO)(
    indexed({"a": ONE, "b": TWO}, {ONE: good("a"), TWO: good("a", "b")})
)
attack("B53-tensor-twice", "'a' is given twice", INDEX)(
    spelt_index(f'{{"weight_map":{{"a":"{ONE}","a":"{TWO}"}}}}', PAIR)
)
attack("B53-map-twice", "'weight_map' is given twice", INDEX)(
    spelt_index(f'{{"weight_map":{{"a":"{ONE}"}},"weight_map":{{"b":"{TWO}"}}}}', PAIR)
)
attack("B54-file-and-index", "give the path of the one that is meant", FILE, INDEX)(
    indexed({"a": ONE, "b": TWO}, {**PAIR, FILE: good("a", "b")})
)
attack("B54-file-and-shards", "give the path of the one that is meant", FILE, ONE)(holding({**PAIR, FILE: good("a")}))
attack("B54-two-files", "give the path of the one that is meant", "one.safetensors", "two.safetensors")(
    holding({"one.safetensors": good("a"), "two.safetensors": good("b")})
)
attack("B55-two-numberings", "shards of several sets", "of-00003", "of-00005")(
    holding({"model-00001-of-00003.safetensors": good("a"), "model-00002-of-00005.safetensors": good("b")})
)
attack("B55-incomplete-numbering", "weight files are missing", TWO)(holding({ONE: good("a")}))
attack("B56-pickle-only", "is pickled: --allow-pickle", "pytorch_model.bin")(
    holding({"pytorch_model.bin": b"\x80\x02"})
)
attack("B56-pickle-named", "is pickled: --allow-pickle", "model.pt")(
    lambda folder: put(folder, b"\x80\x02", "model.pt")
)
attack("B56-pickle-in-index", "is pickled", INDEX, "pytorch_model.bin")(pointing_at("pytorch_model.bin"))
attack("B56-zip-as-safetensors", "zip archive", FILE)(raw(b"PK\x03\x04\x00\x00\x08\x08" + bytes(100)))
attack("B57-adapter-only", r"is an adapter.*base\+adapter")(
    holding({"adapter_model.safetensors": good("a"), "adapter_config.json": b"{}"})
)
attack("B57-adapter-named", "is an adapter", "adapter_model.safetensors")(
    lambda folder: put(folder, good("a"), "adapter_model.safetensors")
)
attack("B60-unfinished-file", "unfinished download")(holding({"model.safetensors.incomplete": b""}))
attack("B61-lfs-pointer", "Git LFS pointer.*git lfs pull", FILE)(
    raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n")
)
attack("B62-html", "is an HTML page", FILE)(raw(b"\n<!DOCTYPE html><html><body>404: not found</body></html>"))
attack("B62-short-html", "is an HTML page", FILE)(raw(b"<html>"))
attack("B62-xml", "is an XML page", FILE)(raw(b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'))
attack("B-gguf", "is GGUF", FILE)(raw(b"GGUF\x03\x00\x00\x00" + bytes(100)))
attack("B-gguf-several", "holds GGUF")(holding({"a.gguf": b"GGUF", "b.gguf": b"GGUF"}))
attack("B-gguf-short", "is cut short", "model.gguf")(holding({"model.gguf": b"GGUF"}))
attack("B-pipeline", "names no part", "model_index.json")(holding({"model_index.json": b"{}"}))
attack("B-nothing", "holds no weights")(holding({}))
attack("B-no-tensor", "holds no tensor", FILE)(raw(packed(b"{}")))
attack("B-config-not-json", "not valid JSON", "config.json")(holding({FILE: good("a"), "config.json": b"{"}))
attack("B-config-list", "expected an object", "config.json")(holding({FILE: good("a"), "config.json": b"[]"}))
attack("B-config-twice", "'a' is given twice", "config.json")(
    holding({FILE: good("a"), "config.json": b'{"a":1,"a":2}'})
)


@attack("B43-index-large", "at most 67108864", INDEX)
def _large_index(folder: Path) -> Path:
    os.truncate(put(folder, b"{", INDEX), (64 << 20) + 1)
    return folder


@attack("B60-dangling-blob", "link to a file that is not there: the download was interrupted", FILE)
def _dangling(folder: Path) -> Path:
    (folder / FILE).symlink_to("../../blobs/0123")
    return folder


@attack("B60-dangling-config", "link to a file that is not there", "config.json")
def _dangling_config(folder: Path) -> Path:
    (folder / "config.json").symlink_to("../../blobs/0123")
    return put(folder, good("a")).parent


@attack("B60-cache-with-parts", "a download is unfinished: download the model again", TWO)
def _cache_with_parts(folder: Path) -> Path:
    snapshot, blobs = folder / "snapshots" / "0123", folder / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    put(blobs, b"half", "4567.incomplete")
    return indexed({"a": ONE, "b": TWO}, {ONE: good("a")})(snapshot)

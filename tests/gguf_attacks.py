"""GGUF files that are wrong: entry 88 of the bad inputs."""

from __future__ import annotations

import struct
from typing import Any

from tests.attacks import Attack, put
from tests.gguf_files import LLAMA, packed, text, value

FILE = "m.gguf"
ONE = {"general.architecture": "novel"}
WEIGHT = (0, (2, 32), bytes(256))


def file(**changes: Any) -> bytes:
    return packed(changes.pop("metadata", ONE), changes.pop("tensors", {"a.weight": WEIGHT}), **changes)


def headed(raw: bytes, entries: int = 1, tensors: int = 0) -> bytes:
    """A file that ends in the middle of its header."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + raw


def q_heads(heads: Any) -> bytes:
    metadata = {**LLAMA, "llama.attention.head_count": heads}
    return packed(metadata, {"blk.0.attn_q.weight": (0, (8, 32), bytes(1024))})


BAD = {
    "D88-empty": (b"", "cut short: the magic takes 4 bytes, 0 are there"),
    "D88-magic": (file(magic=b"GGML"), "is no GGUF file: it begins with b'GGML'"),
    "D88-version-1": (file(version=1), "is GGUF version 1, expected 2 or 3"),
    "D88-big-endian": (file(version=3 << 24), "big-endian"),
    "D88-many-tensors": (file(counts=(1 << 60, 1)), "names 1152921504606846976 tensors"),
    "D88-many-entries": (file(counts=(1, 1 << 40)), "metadata entries"),
    "D88-more-entries": (file(counts=(1, 2)), "is cut short|has a metadata key of|unknown type"),
    "D88-huge-key": (headed(struct.pack("<Q", 1 << 62)), "has a metadata key of"),
    "D88-empty-key": (headed(struct.pack("<Q", 0)), "has a metadata key of 0 bytes"),
    "D88-huge-string": (headed(text("k") + struct.pack("<IQ", 8, 1 << 62)),
     "'k' takes 4611686018427387904 bytes, 0 are"),
    "D88-huge-array": (headed(text("k") + struct.pack("<IIQ", 9, 0, 1 << 62)), "4611686018427387904 items"),
    "D88-array-beyond": (headed(text("k") + struct.pack("<IIQ", 9, 12, 4_000_000)),
     "takes 32000000 bytes, 0 are there"),
    "D88-strings-beyond": (headed(text("k") + struct.pack("<IIQ", 9, 8, 4_000_000)),
     "cut short: the length of an item"),
    "D88-nested-array": (headed(text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64)), "the type 9, expected numbers"),
    "D88-unknown-type": (headed(text("k") + struct.pack("<I", 13)), "'k' the unknown type 13"),
    "D88-truth": (headed(text("k") + struct.pack("<IB", 7, 2)), "a byte other than 0 and 1"),
    "D88-key-utf8": (headed(text(b"\xff") + value("v")), "not UTF-8"),
    "D88-key-twice": (headed((text("k") + value("v")) * 2, entries=2), "the metadata key 'k' twice"),
    "D88-alignment": (file(metadata={**ONE, "general.alignment": ("I", 24)}),
     "general.alignment = '24', expected a power"),
    "D88-alignment-0": (file(metadata={**ONE, "general.alignment": ("I", 0)}), "expected a power of two"),
    "D88-alignment-type": (file(metadata={**ONE, "general.alignment": ("i", 32)}), "expected a power of two as uint32"),
    "D88-no-tensor": (file(tensors={}), "holds no tensor"),
    "D88-tensor-name": (file(tensors={"a\nb": WEIGHT}), "cannot be printed"),
    "D88-rank": (file(tensors={"a": (0, (1, 1, 1, 1, 32), bytes(128))}), "'a' 5 dimensions, at most 4"),
    "D88-zero": (file(tensors={"a": (0, (0, 32), b"")}), r"impossible shape \[32, 0\]"),
    "D88-overflow": (file(tensors={"a": (0, (1 << 40, 1 << 40), b"")}), "impossible shape"),
    "D88-unread-type": (file(tensors={"a": (19, (1, 256), bytes(50))}),
     "stores tensor 'a' as IQ1_S, which is not read"),
    "D88-unknown-number": (file(tensors={"a": (99, (1, 256), bytes(50))}), "as number 99, which is not read"),
    "D88-ragged-blocks": (file(tensors={"a": (12, (1, 128), bytes(72))}), "in blocks of 256, but its rows have 128"),
    "D88-outside": (file()[:-200], "is cut short: tensor 'a.weight' ends at byte"),
    "D88-offset": (file(offsets={"a.weight": 1 << 40}), "at data byte 1099511627776, expected 0"),
    "D88-overlap": (file(tensors={"a": WEIGHT, "b": WEIGHT}, offsets={"b": 128}), "'b' at data byte 128, expected 256"),
    "D88-heads": (q_heads(("I", 3)), r"shape \[8, 32\], whose rows '3' heads cannot share"),
    "D88-heads-0": (q_heads(("I", 0)), "cannot share"),
    "D88-heads-float": (q_heads(("f", 4.0)), "cannot share"),
    "D88-split": (file(metadata={**ONE, "split.count": ("H", 3)}), "is one of '3' files, found 1"),
}  # fmt: skip


def _attack(name: str, content: bytes, pattern: str) -> Attack:
    return Attack(name, lambda folder: put(folder, content, FILE), pattern, (FILE,))


ATTACKS = [_attack(name, *row) for name, row in BAD.items()]

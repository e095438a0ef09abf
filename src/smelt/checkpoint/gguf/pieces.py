"""The vocabulary of a SentencePiece model: as much of its protocol buffer as GGUF holds.

A message is a sequence of (number of the field and how it is stored, content); of the model, field 1 are the
pieces, 2 how it was trained, 3 how texts are normalised.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

#: How a field is stored.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

#: What a token is for.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

#: How a space is written within a piece.
SPACE = "\u2581"

_BPE = 2


class Piece(NamedTuple):
    """A token: its text, its score, and its kind, whose numbers GGUF shares."""

    text: str
    score: float
    kind: int


def read_pieces(model: bytes) -> tuple[list[Piece], bool]:
    """The pieces by id, and whether a text gets a space in front. ValueError when it is no BPE model."""
    pieces, trained, prefix = [], 1, True
    for number, value in _fields(model):
        if number == 1 and isinstance(value, bytes):
            pieces.append(_piece(value))
        elif number == 2 and isinstance(value, bytes):
            trained = int(dict(_fields(value)).get(3, 1))
        elif number == 3 and isinstance(value, bytes):
            prefix = bool(dict(_fields(value)).get(3, True))
    if not pieces:
        raise ValueError("tokenizer.model holds no piece, or is no SentencePiece model")
    if trained != _BPE:
        raise ValueError(f"tokenizer.model is a SentencePiece model of type {trained}, expected BPE ({_BPE})")
    return pieces, prefix


def _piece(message: bytes) -> Piece:
    fields = dict(_fields(message))
    text, score, kind = fields.get(1, b""), fields.get(2, 0.0), fields.get(3, NORMAL)
    if not isinstance(text, bytes) or isinstance(score, bytes) or not isinstance(kind, int):
        raise ValueError("tokenizer.model is no SentencePiece model")
    return Piece(text.decode(), float(score), kind)


def _fields(message: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(number, value) of a message. ValueError when it is cut short."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        stored = tag & 7
        if stored == _VARINT:
            value: int | float | bytes
            value, at = _varint(message, at)
        elif stored in (_FIXED32, _FIXED64):
            size = 4 if stored == _FIXED32 else 8
            value = struct.unpack("<f" if size == 4 else "<d", _part(message, at, size))[0]
            at += size
        elif stored == _BYTES:
            size, at = _varint(message, at)
            value = _part(message, at, size)
            at += size
        else:
            raise ValueError(f"tokenizer.model is no SentencePiece model: it has a field stored as {stored}")
        yield tag >> 3, value


def _part(message: bytes, at: int, size: int) -> bytes:
    part = message[at : at + size]
    if len(part) < size:
        raise ValueError("tokenizer.model is cut short")
    return part


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = _part(message, at, 1)[0]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("tokenizer.model is no SentencePiece model: a number has more than 64 bits")

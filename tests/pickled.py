"""Files of torch.save spelt by hand, right and wrong."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np

REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def number(value: int) -> bytes:
    raw = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    key: str, shape: Sequence[int], strides: Sequence[int] | None = None, *, offset: int = 0,
    kind: str = "FloatStorage", count: int | None = None,
) -> bytes:  # fmt: skip
    """The instructions that rebuild a tensor on the storage ``key``."""
    steps = [prod(shape[place + 1 :]) for place in range(len(shape))] if strides is None else strides
    stored = prod(shape) if count is None else count
    pid = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(stored) + b"tQ"
    return REBUILD + b"(" + pid + number(offset) + numbers(shape) + numbers(steps) + b"\x89NtR"


def mapping(values: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in values.items()) + b"u"


def pickled(instructions: bytes) -> bytes:
    return b"\x80\x02" + instructions + b"."


def save(path: Path, instructions: bytes, records: Mapping[str, bytes] | None = None, method: int = 0) -> Path:
    """A zip as torch writes it."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled(instructions))
        for name, data in (records or {}).items():
            archive.writestr(f"archive/{name}", data)
    return path


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """float32 arrays as a state dict."""
    keys = {name: str(place) for place, name in enumerate(arrays)}
    values = {name: tensor(keys[name], array.shape) for name, array in arrays.items()}
    records = {f"data/{keys[name]}": array.astype(np.float32).tobytes() for name, array in arrays.items()}
    return save(path, mapping(values), records)

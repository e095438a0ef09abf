"""Read a published folder with nothing of smelt: the format's rules in plain Python, checked on the way."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

_VALUES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """One tensor as its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def values(self) -> npt.NDArray[Any]:
        return np.frombuffer(self.data, _VALUES[self.dtype]).reshape(self.shape)


def stored(folder: Path) -> dict[str, Stored]:
    """All tensors of all weight files by name; they must be what the index says, once each."""
    files = {path.name: _file(path) for path in sorted(folder.glob("*.safetensors"))}
    homes = {name: file for file, tensors in files.items() for name in tensors}
    assert len(homes) == sum(map(len, files.values())), "a tensor is in two files"
    index = folder / "model.safetensors.index.json"
    if index.exists():
        assert json.loads(index.read_text())["weight_map"] == homes
        assert list(files) == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    else:
        assert list(files) == ["model.safetensors"]
    return {name: files[file][name] for name, file in sorted(homes.items())}


def _file(path: Path) -> dict[str, Stored]:
    """The tensors of one file, which must fill it without hole or overlap."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    body, end, found = raw[8 + length :], 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        assert first == end, f"a hole or an overlap before {name}"
        end = last
        tensor = Stored(entry["dtype"], tuple(entry["shape"]), body[first:last])
        assert len(tensor.data) == tensor.values.nbytes
        found[name] = tensor
    assert end == len(body), "bytes after the last tensor"
    return found


def values(folder: Path) -> dict[str, npt.NDArray[Any]]:
    return {name: tensor.values for name, tensor in stored(folder).items()}


def nothing_left(out: Path) -> bool:
    """Neither the output nor a staging folder for it exists."""
    return not out.exists() and not list(out.parent.glob(f"{out.name}*"))

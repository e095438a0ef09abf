"""What must hold after any run, however it ended. Plain Python: nothing of smelt is used to judge it.

I1  the destination is absent, or byte for byte the fault-free result, or (overwriting) byte for byte the old one
I2  the inputs are what they were, contents and times
I3  nothing else was touched: beside the destination there may be its work folder, and no other name
I4  the exit code is 0 if and only if the destination is the new result
I5  whoever reads the destination by its index, or its only weight file, finds the tensors of one model
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

Files = dict[str, bytes]
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def files_of(folder: Path) -> Files:
    """Every file below a folder by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tensors_of(files: Mapping[str, bytes]) -> Tensors:
    """The tensors that a loader finds: by the index where there is one, else in the only weight file."""
    index = files.get("model.safetensors.index.json")
    if index is None:
        return _tensors(files["model.safetensors"])
    homes: dict[str, str] = json.loads(index)["weight_map"]
    opened = {name: _tensors(files[name]) for name in set(homes.values())}
    return {name: opened[home][name] for name, home in homes.items()}


def _tensors(data: bytes) -> Tensors:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body, found, end = data[8 + length :], {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        assert first == end, "a hole or an overlap"
        end = last
        found[name] = entry["dtype"], tuple(entry["shape"]), body[first:last]
    assert end == len(body), "bytes after the last tensor"
    return found


def stamp(folder: Path) -> dict[str, tuple[int, str]]:
    """Time and digest of every file below a folder."""
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(frozen=True)
class Expected:
    """What a destination may be. ``old`` is None for a fresh one."""

    new: Files
    old: Files | None
    inputs: Path
    stamps: Mapping[str, tuple[int, str]]


def violations(out: Path, expected: Expected, exit_code: int | None) -> list[str]:
    """What does not hold; ``exit_code`` is None for a run that could not exit by itself."""
    found = []
    state = state_of(out, expected)
    if state == "mixture":
        found.append(f"I1: {out} is neither old nor new: {sorted(os.listdir(out))}")
    if stamp(expected.inputs) != expected.stamps:
        found.append("I2: an input was changed")
    strangers = set(os.listdir(out.parent)) - {out.name, f"{out.name}.smelt-work"}
    if strangers:
        found.append(f"I3: {sorted(strangers)} beside the destination")
    if exit_code is not None and (exit_code == 0) != (state == "new"):
        found.append(f"I4: exit code {exit_code}, the destination is {state}")
    return found + _mixed(out, expected)


def state_of(out: Path, expected: Expected) -> str:
    """absent, old, new or mixture."""
    if not os.path.lexists(out):
        return "absent" if expected.old is None else "mixture"
    files = files_of(out)
    return "new" if files == expected.new else "old" if files == expected.old else "mixture"


def _mixed(out: Path, expected: Expected) -> list[str]:
    """I5."""
    if not out.exists():
        return []
    try:
        found = tensors_of(files_of(out))
    except (AssertionError, KeyError, ValueError, struct.error) as error:
        return [f"I5: a reader fails: {error!r}"]
    models = [tensors_of(files) for files in (expected.new, expected.old) if files]
    return [] if found in models else ["I5: a reader finds tensors of several models"]

"""`smelt verify`: read an artefact again and compare every byte with its manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import storage
from ..checkpoint import ADAPTER, Checkpoint, Part, TensorInfo, load, load_adapter, plan_file
from ..errors import InputRejected, show
from .manifest import FORMAT, NAME, STATE_FOLDER, sum_of
from .progress import Progress, Silent
from .sink import sha256_of


@dataclass
class Verification:
    """What :func:`verify` found. ``ok`` when nothing differs."""

    folder: Path
    tensors: int = 0
    files: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "tensors": self.tensors, "files": self.files, "problems": self.problems}


def verify(folder: str | Path, *, progress: Progress | None = None) -> Verification:
    """Hash every tensor and side file of an artefact and compare with its manifest.

    Raises InputRejected when there is no usable manifest; a difference is a problem in the result.
    """
    folder = Path(folder)
    content = read_manifest(folder)
    found = Verification(folder)
    state = content.get("state", {}).get("tensors", {})
    _verify_files(folder, content["files"], found, bool(state))
    try:
        _verify_tensors(folder, content["tensors"], found, progress or Silent())
        if state:
            _verify_tensors(folder / STATE_FOLDER, state, found, progress or Silent())
    except InputRejected as error:
        found.problems += error.problems
    if found.ok:
        found.problems += _changed_headers(folder, content["tensors"])
        found.problems += _changed_headers(folder, state)
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    if not path.is_file():
        raise InputRejected(f"{show(folder)} has no {NAME}: it was not made by smelt, or is not whole")
    try:
        content = json.loads(storage.read_small(path, 1 << 28))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        for tensors in (content["tensors"], content.get("state", {}).get("tensors", {})):
            _check_told(tensors)
        if not isinstance(content["files"], Mapping):
            raise ValueError("files is no object")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputRejected(f"{show(path)} is not a manifest that this version reads: {error}") from error
    return content  # type: ignore[no-any-return]


def _check_told(tensors: Mapping[str, Any]) -> None:
    """ValueError, or another error of data in the wrong form, where something of a tensor is missing."""
    if not all({"dtype", "shape", "sha256"} <= tensor.keys() for tensor in tensors.values()):
        raise ValueError("a tensor lacks its dtype, shape or sha256")
    if not all(isinstance(tensor.get("file", ""), str) for tensor in tensors.values()):
        raise ValueError("the file of a tensor is no text")


def _verify_files(folder: Path, wanted: Mapping[str, str], found: Verification, state: bool) -> None:
    """Side files byte by byte; files that nobody listed. ``state``: whether there is to be one."""
    present = set(storage.files_below(folder)) - {NAME}
    weights = {name for name in present if name.endswith((".safetensors", ".gguf"))}
    weights -= set() if state else {name for name in weights if name.startswith(f"{STATE_FOLDER}/")}
    found.problems += [f"file {show(name)} is missing" for name in sorted(set(wanted) - present)]
    found.problems += [f"file {show(name)} is not in the manifest" for name in sorted(present - weights - set(wanted))]
    for name in sorted(set(wanted) & present):
        found.files += 1
        if sum_of(folder / name) != wanted[name]:
            found.problems.append(f"file {show(name)} differs from the manifest")


def _verify_tensors(folder: Path, wanted: Mapping[str, Any], found: Verification, progress: Progress) -> None:
    adapter = {tensor.get("file") for tensor in wanted.values()} == {ADAPTER}
    with load_adapter(folder) if adapter else load(folder, as_stored=True) as checkpoint:
        names = set(checkpoint.tensors)
        found.problems += [f"tensor {show(name)} is missing" for name in sorted(set(wanted) - names)]
        found.problems += [f"tensor {show(name)} is not in the manifest" for name in sorted(names - set(wanted))]
        progress.start(sum(info.nbytes for info in checkpoint.tensors.values()), "verifying")
        for name in sorted(set(wanted) & names):
            found.problems += _difference(checkpoint, name, wanted[name], progress)
            found.tensors += 1
        progress.finish()


def _changed_headers(folder: Path, tensors: Mapping[str, Any]) -> Iterator[str]:
    """Weight files whose header reads well, but is not that which smelt writes for these tensors."""
    files = {str(tensor.get("file")) for tensor in tensors.values()}
    there = set(storage.files_below(folder))
    yield from (f"there is no file {show(file)}, which the manifest names" for file in sorted(files - there))
    for file in sorted(name for name in files & there if name.endswith(".safetensors")):
        wanted = plan_file(file, list(_named_in(file, tensors))).header
        if storage.read_start(folder / file, len(wanted)) != wanted:
            yield f"the header of {show(file)} differs from what smelt has written"


def _named_in(file: str, tensors: Mapping[str, Any]) -> Iterator[TensorInfo]:
    """The tensors of a file under the names that its header has: those of a part lack their folder's."""
    prefix = Part(file.rpartition("/")[0]).prefix
    for name, tensor in tensors.items():
        if tensor.get("file") == file:
            yield TensorInfo(name.removeprefix(prefix), tensor["dtype"], tuple(tensor["shape"]))


def _difference(checkpoint: Checkpoint, name: str, wanted: Mapping[str, Any], progress: Progress) -> list[str]:
    info = checkpoint.tensors[name]
    if [info.dtype, list(info.shape)] != [wanted["dtype"], wanted["shape"]]:
        return [f"tensor {show(name)} is {info.dtype} {list(info.shape)}, expected {wanted['dtype']} {wanted['shape']}"]
    if sha256_of(checkpoint.read, info, progress.advance) != wanted["sha256"]:
        return [f"tensor {show(name)} in {show(info.file)} differs from the manifest"]
    return []

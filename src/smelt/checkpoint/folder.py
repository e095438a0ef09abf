"""A checkpoint on disk: a Hugging Face style folder, or one safetensors file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from .. import storage
from ..errors import InputRejected, OperationFailed, show
from .base import Checkpoint, FileIdentity, TensorInfo
from .documents import read_json
from .safetensors import SafetensorsFile

#: Names under which one file, or an index over several, may stand; the first is transformers'.
STEMS = ("model", "diffusion_pytorch_model", "open_clip_model")

_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class FolderCheckpoint(Checkpoint):
    """Safetensors files of one folder, opened once and read by position."""

    def __init__(self, source: Path, label: str, revision: str | None = None) -> None:
        self.label = label
        self.revision = revision
        self.folder = source if source.is_dir() else source.parent
        self._files: dict[str, SafetensorsFile] = {}
        names, weight_map = weight_files(source)
        try:
            self._open(names)
            self.tensors: Mapping[str, TensorInfo] = self._united(weight_map)
        except BaseException:
            self.close()
            raise
        self.config: Mapping[str, Any] = read_config(self.folder)
        self.metadata = {k: v for file in self._files.values() for k, v in file.metadata.items()}
        self.notices = [note for file in self._files.values() for note in file.notices]

    def _open(self, names: Iterable[str]) -> None:
        for name in names:
            assert self.folder is not None
            self._files[name] = SafetensorsFile(self.folder / name)

    def _united(self, weight_map: Mapping[str, str] | None) -> dict[str, TensorInfo]:
        """All tensors of all files, agreeing with the index where there is one."""
        found: dict[str, TensorInfo] = {}
        problems = []
        for name, file in self._files.items():
            for tensor, info in file.tensors.items():
                if tensor in found:
                    problems.append(f"{self.label}: tensor {show(tensor)} is in {show(found[tensor].file)} and {show(name)}")
                found[tensor] = info
        if weight_map is not None:
            problems += _disagreements(self.label, found, weight_map)
        InputRejected.gather(problems)
        return dict(sorted(found.items()))

    def read(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        info = self.tensors[name]
        self._files[info.file].read(info, start, out)

    def check_unchanged(self) -> None:
        for file in self._files.values():
            try:
                now = FileIdentity.of(file.path, file.path.stat())
            except OSError as error:
                raise OperationFailed(f"{show(file.path)} has gone while it was being read") from error
            if now != file.identity:
                raise OperationFailed(f"{show(file.path)} changed while it was being read: repeat the run")

    def files(self) -> list[FileIdentity]:
        return [self._files[name].identity for name in sorted(self._files)]

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}


def _disagreements(label: str, found: Mapping[str, TensorInfo], weight_map: Mapping[str, str]) -> list[str]:
    """Where index and files tell different things."""
    problems = []
    for name in sorted(weight_map.keys() - found.keys()):
        problems.append(f"{label}: tensor {show(name)} is listed in the index but not in {show(weight_map[name])}")
    for name in sorted(found.keys() - weight_map.keys()):
        problems.append(f"{label}: tensor {show(name)} is in {show(found[name].file)} but not in the index")
    for name in sorted(found.keys() & weight_map.keys()):
        if found[name].file != weight_map[name]:
            problems.append(f"{label}: the index puts tensor {show(name)} in {show(weight_map[name])}, it is in {show(found[name].file)}")
    return problems


def read_config(folder: Path) -> Mapping[str, Any]:
    """The parsed config.json; empty when there is none."""
    path = folder / "config.json"
    return read_json(path) if path.exists() else {}


# --- which files ----------------------------------------------------------------------------------------


def weight_files(source: Path) -> tuple[list[str], Mapping[str, str] | None]:
    """The safetensors files of a checkpoint, and the index's map from tensor to file, if there is one.

    Raises InputRejected when there are none, or when it is not clear which are meant.
    """
    if not source.is_dir():
        return [source.name], None
    names = storage.listdir(source)
    weights = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_model")]
    indices = [f"{stem}.safetensors.index.json" for stem in STEMS if f"{stem}.safetensors.index.json" in names]
    single = [f"{stem}.safetensors" for stem in STEMS if f"{stem}.safetensors" in names]
    if indices and single:
        raise InputRejected(
            f"{show(source)} holds {indices[0]} and {single[0]}: two models in one folder, remove the stale one or "
            "name the file that is meant"
        )
    if indices:
        return _from_index(source, indices[0], names)
    if single:
        return [single[0]], None
    return _without_index(source, weights, names), None


def _from_index(folder: Path, index: str, names: list[str]) -> tuple[list[str], Mapping[str, str]]:
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputRejected(f"{show(folder / index)}: weight_map must map tensor names to file names")
    files = sorted(set(weight_map.values()))
    problems = [f"{show(index)}: {show(file)} is no plain file name" for file in files if not _is_plain(file)]
    problems += [f"{show(index)}: the shard {show(file)} is missing" for file in files if _is_plain(file) and file not in names]
    InputRejected.gather(problems)
    return files, weight_map


def _is_plain(file: str) -> bool:
    """A name in the same folder: no separator, no drive, no parent, nothing unprintable."""
    return file.isprintable() and file not in ("", ".", "..") and not any(mark in file for mark in "/\\:")


def _without_index(folder: Path, weights: list[str], names: list[str]) -> list[str]:
    numbered = [match for name in weights if (match := _NUMBERED.fullmatch(name))]
    if numbered and len(numbered) == len(weights):
        return _complete_set(folder, numbered)
    if len(weights) == 1:
        return weights
    if len(weights) > 1:
        raise InputRejected(f"{show(folder)} holds {len(weights)} safetensors files and no index: name the one that is meant")
    raise InputRejected(_why_nothing(folder, names))


def _complete_set(folder: Path, numbered: list[re.Match[str]]) -> list[str]:
    totals = sorted({(match[1], match[3]) for match in numbered})
    if len(totals) > 1:
        raise InputRejected(f"{show(folder)} holds shards of {len(totals)} sets and no index: remove the stale ones")
    stem, total = totals[0]
    wanted = [f"{stem}-{number:05d}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
    missing = sorted(set(wanted) - {match[0] for match in numbered})
    if missing:
        raise InputRejected(f"{show(folder)}: the shard {show(missing[0])} is missing ({len(missing)} in all)")
    return wanted


def _why_nothing(folder: Path, names: list[str]) -> str:
    """What is there instead of weights."""
    if any(name.startswith("adapter_") for name in names):
        return f"{show(folder)} is an adapter, not a model: name the base it belongs to as base+adapter"
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"{show(folder)} holds only pickled weights ({show(pickles[0])}), which can run code when they are read: "
            "convert them to safetensors first (save_pretrained of a current transformers does)"
        )
    if "model_index.json" in names:
        return f"{show(folder)} is a diffusers pipeline: name one of its parts, such as {folder.name}/unet"
    if any(name.endswith(".incomplete") for name in names):
        return f"{show(folder)} holds an unfinished download: finish it"
    return f"{show(folder)} holds no safetensors file"

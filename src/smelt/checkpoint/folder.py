"""A checkpoint in files: a Hugging Face style folder, or one file, on disk or elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import InputRejected, show
from .base import OpenFiles, Part, TensorInfo
from .place import Place, Target, target
from .safetensors import MAX_TENSORS, SafetensorsFile
from .selection import NUMBERED, PICKLED, WeightMap, adapter_file, choose, read_index, refuse_other_formats, stem_of
from .side import SideFiles
from .stored import Stored

_MOST_PROBLEMS = 20
_MOST_NOTICES = 20

#: Configs that belong to files of one stem alone; a folder may hold the same model for several libraries.
_CONFIGS = {"open_clip_model": ("open_clip_config.json",)}

if TYPE_CHECKING:
    from .state_dict import PickledFile

    _File = SafetensorsFile | PickledFile


class FolderCheckpoint(OpenFiles):
    """Weight files of one folder, opened once and read by position.

    ``source`` is a folder, an index in it, or one file, as a path or as a place and the name of a file in it; with
    ``adapter`` the folder of an adapter. Pickled files are read with ``allow_pickle`` only, and only where there is
    no safetensors file.
    Raises InputRejected when it is malformed or when it is not clear which files are meant, with everything
    that is wrong at once.
    """

    def __init__(
        self, source: Path | Target, label: str | None = None, revision: str | None = None, *, adapter: bool = False,
        allow_pickle: bool = False,
    ) -> None:  # fmt: skip
        self.label = str(source) if label is None else label
        self.revision = revision
        self._files: dict[str, _File] = {}
        self._told: list[str] = []
        place, file = target(source) if isinstance(source, Path) else source
        self.scratch = place.scratch
        try:
            adapted = [adapter_file(place, pickled=allow_pickle)] if adapter else None
            names, weight_map = (adapted, None) if adapted else _locate(place, file, allow_pickle)
            self._open(place, names)
            self.tensors: Mapping[str, TensorInfo] = _united(place, self._files, weight_map)
            self.config: Mapping[str, Any] = place.json("config.json")
        except BaseException:
            self.close()
            raise
        self.parts = (Part(stem=stem_of(names[0])),)
        self.beside = _CONFIGS.get(self.parts[0].stem, ())
        # A file among many has no side files of its own, unless its folder is plainly a model's.
        whole = file != names[0] or self.config or any(name in place.beside() for name in self.beside)
        self._home = place if whole else None
        self.folder = None if self._home is None else place.folder
        headers = [file.header for file in self._files.values()]
        self.metadata = {key: text for header in headers for key, text in header.metadata.items()}
        oddities = (notice for notices in (self._told, *(header.notices for header in headers)) for notice in notices)
        self.notices = [*_one_of_many(file or ""), *islice(oddities, _MOST_NOTICES)]

    @property
    def side_files(self) -> Mapping[str, bytes]:
        return SideFiles(self._home)

    def strip(self) -> None:
        super().strip()
        self._home = None

    def _open(self, place: Place, names: Iterable[str]) -> None:
        problems: list[str] = []
        count = 0
        for name in names:
            try:
                self._files[name] = file = self._opened(place.open(name), name)
                count += len(file.header.tensors)
            except InputRejected as error:
                problems += error.problems
            if count > MAX_TENSORS:
                raise InputRejected(f"{place.shown()} holds more than {MAX_TENSORS} tensors")
        _gather(problems)

    def _opened(self, stored: Stored, name: str) -> _File:
        self._told += stored.notices
        if not name.endswith(PICKLED.endings):
            return SafetensorsFile(stored)
        from .state_dict import PickledFile

        return PickledFile(stored)

    def read(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        info = self.tensors[name]
        self._files[info.file].read(info, start, out)

    def read_runs(self, name: str, starts: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        info = self.tensors[name]
        self._files[info.file].read_runs(info, starts, out)


def _locate(place: Place, file: str | None, pickled: bool) -> tuple[Sequence[str], WeightMap | None]:
    """The weight files, and the index's map where there is one."""
    if file is None:
        return choose(place, pickled=pickled)
    refuse_other_formats(place, file, pickled=pickled)
    return read_index(place, file, pickled=pickled) if file.endswith(".index.json") else ([file], None)


def _one_of_many(file: str) -> list[str]:
    number = NUMBERED.fullmatch(file)
    if number is None or int(number[3]) < 2:
        return []
    return [f"{show(file)} is one of {int(number[3])} shards: the tensors of the others are not read"]


def _united(place: Place, files: Mapping[str, _File], weight_map: WeightMap | None) -> dict[str, TensorInfo]:
    """All tensors of all files by name, none twice, as the index lists them where there is one."""
    found: dict[str, TensorInfo] = {}
    twice = []
    for file in files.values():
        twice += [(found[name].file, info) for name, info in file.header.tensors.items() if name in found]
        found |= file.header.tensors
    where = place.shown()
    problems = [f"{where}: tensor {show(i.name)} is in {show(file)} and again in {show(i.file)}" for file, i in twice]
    if weight_map is not None:
        problems += _disagreements(where, found, weight_map, {info.name for _, info in twice})
    _gather(problems)
    if not found:
        raise InputRejected(f"{where}: {', '.join(map(show, files))} holds no tensor")
    return dict(sorted(found.items()))


def _disagreements(
    where: str, found: Mapping[str, TensorInfo], weight_map: WeightMap, twice: set[str]
) -> Iterator[str]:
    """Where index and files say different things of a tensor."""
    advice = "rebuild or remove the index"
    for name in sorted((weight_map.keys() | found.keys()) - twice):
        tensor = f"{where}: tensor {show(name)}"
        if name not in found:
            yield f"{tensor} is in the index but not in {show(weight_map[name])}: {advice}"
        elif name not in weight_map:
            yield f"{tensor} is in {show(found[name].file)} but not in the index: {advice}"
        elif found[name].file != weight_map[name]:
            yield f"{tensor} is in {show(found[name].file)}, the index says {show(weight_map[name])}: {advice}"


def _gather(problems: Sequence[str]) -> None:
    """Raise InputRejected for what is wrong, the first of it in full."""
    rest = len(problems) - _MOST_PROBLEMS
    InputRejected.gather(
        [*problems[:_MOST_PROBLEMS], *([f"and {rest} more problems of this kind"] if rest > 0 else [])]
    )

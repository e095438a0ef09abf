"""Models in several folders: pipelines of diffusers (model_index.json) and of sentence-transformers (modules.json).

Each folder with weights is a checkpoint of its own; together they are one, whose tensors bear the folder's name
in front ("unet.conv_in.weight"). What lies at the top, as the encoder of sentence-transformers does, keeps its names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputRejected, show
from ..storage import FileIdentity
from .base import Checkpoint, Part
from .documents import MAX_BYTES, brief, parse_json
from .place import Place
from .selection import PICKLED, SAFETENSORS
from .side import SideFiles

INDICES = ("model_index.json", "modules.json")

#: What stands at the top beside the indices, of sentence-transformers.
_AT_THE_TOP = re.compile(r"config_sentence_transformers\.json|sentence_[a-z_-]+_config\.json", re.ASCII)

#: In a folder of the pipeline, everything travels but weights, in whatever format, and what is for people.
_LEFT_BEHIND = (
    *SAFETENSORS.endings, *PICKLED.endings, ".index.json", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot",
    ".md", ".png", ".jpg",
)  # fmt: skip

_MOST_FOLDERS = 100


@dataclass(frozen=True)
class Layout:
    """The folders of a pipeline, those with weights apart; the top is called ""."""

    index: str
    folders: tuple[str, ...]
    weighted: tuple[str, ...]


def layout_of(home: Place) -> Layout | None:
    """How a folder is laid out, or None where it is a plain one. Raises InputRejected."""
    index = next((name for name in INDICES if home.has(name)), None)
    if index is None:
        return None
    raw, where = home.small(index, MAX_BYTES) or b"", home.shown(index)
    named = _diffusers(raw, where) if index == INDICES[0] else _sentence_transformers(raw, where)
    _check(where, named)
    there = {name: not name or home.has_folder(name) for name in named}
    InputRejected.gather(
        f"{where} names the part {show(name)}, but there is no such folder: is the download whole?"
        for name, is_there in there.items()
        if not is_there and index == INDICES[0]
    )
    folders = tuple(name for name, is_there in there.items() if is_there)
    return Layout(index, folders, tuple(name for name in folders if _has_weights(inner(home, name), index)))


def inner(home: Place, folder: str) -> Place:
    """A folder of a pipeline, which may be the top itself."""
    return home.inside(folder) if folder else home


def _diffusers(raw: bytes, where: str) -> list[str]:
    """The parts that are there: [library, class], which is [null, null] for those that are not."""
    content = parse_json(raw, where)
    parts = {name: value for name, value in content.items() if isinstance(value, list) and len(value) == 2}
    return [name for name, value in parts.items() if value[1] is not None]


def _sentence_transformers(raw: bytes, where: str) -> list[Any]:
    """Modules in order; one that holds nothing, such as a normalisation, may have no folder."""
    modules = parse_json(b'{"modules":' + raw + b"}", where)["modules"]  # a list at the top
    if not isinstance(modules, list) or not all(isinstance(module, Mapping) for module in modules):
        raise InputRejected(f"{where} holds {brief(modules)}, expected a list of modules")
    return [module.get("path") for module in modules]


def _check(where: str, named: list[Any]) -> None:
    """Folders beside the index, by their plain names."""
    wrong = [name for name in named if not isinstance(name, str) or (name and not _is_plain(name))]
    if wrong or not named or len(named) > _MOST_FOLDERS:
        what = f"the part {brief(wrong[0])}, expected the plain name of a folder beside it" if wrong else "no part"
        raise InputRejected(f"{where} names {what if len(named) <= _MOST_FOLDERS else 'too many parts'}")


def _is_plain(name: str) -> bool:
    return name.isprintable() and len(name) <= 255 and not name.startswith(".") and not set(name) & set("/\\:")


def _has_weights(folder: Place, index: str) -> bool:
    """Whether a folder holds weights, or must: a config.json is a model's in diffusers."""
    names = folder.names()
    named = any(kind.has(name) or name.endswith(kind.index) for name in names for kind in (SAFETENSORS, PICKLED))
    return named or (index == INDICES[0] and folder.has("config.json"))


class PipelineCheckpoint(Checkpoint):
    """The checkpoints of a pipeline's folders as one, which owns them. ``opened``: those with weights, by folder."""

    def __init__(
        self, home: Place, layout: Layout, opened: Mapping[str, Checkpoint], label: str, revision: str | None = None
    ) -> None:
        self.label, self.revision, self.folder, self._home = label, revision, home.folder, home
        self.opened, self._layout, self._stripped = dict(opened), layout, False
        self.parts = tuple(Part(folder, made.parts[0].stem) for folder, made in opened.items())
        self.scratch = max((made.scratch for made in opened.values()), default=0)
        self.held = sum(made.held for made in opened.values())
        self._owners = dict(self._named(opened))
        if len(self._owners) < sum(map(len, opened.values())):
            raise InputRejected(f"{home.shown()}: a tensor at the top is called as one in a folder")
        if not self._owners:
            raise InputRejected(f"{home.shown()}: no folder that {layout.index} names holds weights")
        self.tensors = dict(sorted(self._infos()))
        self._nested = [name for folder in layout.folders if folder for name in _side_files(home, folder)]
        if "" in opened:
            self.config = opened[""].config
        own = [layout.index, *filter(_AT_THE_TOP.fullmatch, _known(home))]
        self.beside = tuple(dict.fromkeys([*own, *self._nested, *chain(*(made.beside for made in opened.values()))]))
        self.metadata = {key: text for made in opened.values() for key, text in made.metadata.items()}
        self.notices = [f"{folder or 'top'}: {note}" for folder, made in opened.items() for note in made.notices]
        if not home.lists:
            self.notices.append(f"{home.shown()} lists no folders: only files of usual names are taken along")

    def _named(self, opened: Mapping[str, Checkpoint]) -> Iterator[tuple[str, tuple[Part, Checkpoint, str]]]:
        for part, made in zip(self.parts, opened.values(), strict=True):
            yield from ((part.prefix + name, (part, made, name)) for name in made.tensors)

    def _infos(self) -> Iterator[tuple[str, Any]]:
        for name, (part, made, own) in self._owners.items():
            info = made.tensors[own]
            yield name, replace(info, name=name, file=part.inside(info.file))

    @property
    def side_files(self) -> Mapping[str, bytes]:
        return {} if self._stripped else SideFiles(self._home, self._nested)

    def strip(self) -> None:
        super().strip()
        self._stripped = True

    def read(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        _, made, own = self._owners[name]
        made.read(own, start, out)

    def read_runs(self, name: str, starts: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        _, made, own = self._owners[name]
        made.read_runs(own, starts, out)

    def check_unchanged(self) -> None:
        for made in self.opened.values():
            made.check_unchanged()

    def files(self) -> list[FileIdentity]:
        return sorted((file for made in self.opened.values() for file in made.files()), key=lambda file: str(file.path))

    def close(self) -> None:
        for made in self.opened.values():
            made.close()

    def of_parts(self, change: Callable[[Checkpoint], Checkpoint]) -> PipelineCheckpoint:
        """The same pipeline with what ``change`` makes of its parts."""
        opened = {folder: change(made) for folder, made in self.opened.items()}
        return PipelineCheckpoint(self._home, self._layout, opened, self.label, self.revision)


def _known(place: Place) -> list[str]:
    return place.names() if place.lists else place.beside()


def _side_files(home: Place, folder: str) -> Iterator[str]:
    place = home.inside(folder)
    for name in _known(place):
        plain = not name.startswith(".") and not name.lower().endswith(_LEFT_BEHIND)
        if plain and not place.has_folder(name):
            yield f"{folder}/{name}"

"""A GGUF file as a checkpoint: dequantised, with Hugging Face's names, layout and config."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputRejected, show
from ...kernels.dtypes import DTYPES, name_of
from ..base import OpenFiles, TensorInfo
from ..place import Place
from .families import FAMILIES, Family
from .file import GgufFile
from .format import PLAIN, StoredTensor
from .header import GgufHeader
from .rotary import LLAMA3_FACTORS, LONG_FACTORS, count_in, llama3_scaling, long_scaling
from .settings import config_of
from .tokenizer import TokenizerFiles

#: A file of a split set: stem, number, total.
NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.ASCII)

_SPLITS = "split.count"

_MOST_EXPERTS = 65_536
_MOST_FACTORS = 65_536


@dataclass(frozen=True)
class View:
    """How a tensor is made of a stored one: its elements from ``first`` on, as ``shape``.

    ``heads``: so many share out the rows, which are interleaved there; ``shifted``: 1 was added.
    """

    stored: StoredTensor
    first: int
    shape: tuple[int, ...]
    heads: int | None = None
    shifted: bool = False

    @property
    def dtype(self) -> str:
        return "F32" if self.shifted or self.stored.kind not in PLAIN else self.stored.kind


def interleaved(rows: npt.NDArray[np.int64], count: int, heads: int) -> npt.NDArray[np.int64]:
    """Where GGUF keeps row r of q or k (``count`` rows): the two halves of a head take turns."""
    size = count // heads
    head, place = np.divmod(rows, size)
    half, pair = np.divmod(place, size // 2)
    found: npt.NDArray[np.int64] = head * size + 2 * pair + half
    return found


class GgufCheckpoint(OpenFiles):
    """One GGUF file, or all files of a split set when one of them is named.

    ``header`` is that of the first file. Tensors of an architecture that is not known keep their names. Quantised
    ones are read as float32. Raises InputRejected when a file is malformed or missing.
    """

    def __init__(self, place: Place, name: str, label: str, revision: str | None = None) -> None:
        self.label, self.revision, self.scratch = label, revision, place.scratch
        self._files: dict[str, GgufFile] = {}
        self.notices: list[str] = []
        try:
            for part in _parts(place, name):
                stored_file = place.open(part)
                self._files[part] = GgufFile(stored_file)
                self.notices += (*stored_file.notices, *self._files[part].header.notices)
            self.header = next(iter(self._files.values())).header
            stored = dict(_united(place.shown(name), [file.header for file in self._files.values()]))
            self._views = self._viewed(stored)
        except BaseException:
            self.close()
            raise
        self.metadata = {key: text for key, text in self.header.metadata.items() if _is_fact(key, text)}
        self._spelled: Mapping[str, bytes] = TokenizerFiles(self.header.metadata)
        native = _native(self._views.values())
        if self.config:
            self.config = {**self.config, "dtype": name_of(native)}
        infos = ((name, _info(name, view, native)) for name, view in sorted(self._views.items()))
        self.tensors: Mapping[str, TensorInfo] = dict(infos)

    @property
    def side_files(self) -> Mapping[str, bytes]:
        """Those of the tokenizer that the file holds, where they can be made exactly."""
        return self._spelled

    @property
    def unwritten(self) -> Sequence[str]:
        problem = getattr(self._spelled, "problem", None)
        if problem is None:
            return ()
        return [f"its tokenizer is not written: {problem}; copy tokenizer.json of the original model beside the result"]

    def strip(self) -> None:
        super().strip()
        self._spelled = {}

    # --- opening --------------------------------------------------------------------------------------------

    def _viewed(self, stored: dict[str, StoredTensor]) -> dict[str, View]:
        name = self.header.metadata.get("general.architecture")
        family = FAMILIES.get(name) if isinstance(name, str) else None
        if family is None:
            self.notices.append(f"the GGUF architecture {show(name)} is not known: its tensors keep their names")
            return {own: View(tensor, 0, tensor.shape) for own, tensor in stored.items()}
        self._configure(family, stored)
        views: dict[str, View] = {}
        strange = []
        for tensor in stored.values():
            theirs = family.hugging_face(tensor.name)
            found = _views(family, tensor, theirs, self.config)
            if twice := found.keys() & views.keys():
                raise InputRejected(f"{show(tensor.file)}: two tensors are {show(min(twice))}")
            views |= found
            strange += [tensor.name] if theirs is None else []
        if strange:
            self.notices.append(f"{len(strange)} tensors keep their GGUF names, such as {show(strange[0])}")
        return views

    def _configure(self, family: Family, stored: dict[str, StoredTensor]) -> None:
        """Set the config; what is only a setting there leaves ``stored``."""
        embedding = stored.get("token_embd.weight")
        rows = None if embedding is None else embedding.shape[0]
        config, notices = config_of(family, self.header.metadata, rows, "output.weight" not in stored)
        self.config = config
        self.notices += notices
        if freqs := stored.pop(LLAMA3_FACTORS, None):
            scaling = llama3_scaling(self._whole(freqs), config["rope_theta"])
            if scaling is None:
                self.notices.append("its rotary factors are none of Llama 3's: config.json lacks them")
            config |= {} if scaling is None else {"rope_scaling": scaling}
        factors = {key: stored.pop(name, None) for key, name in LONG_FACTORS.items()}
        if all(factors.values()):
            config["rope_scaling"] = long_scaling({key: self._whole(one) for key, one in factors.items() if one})
            original = count_in(self.header.metadata, f"{family.architecture}.rope.scaling.original_context_length")
            config |= {} if original is None else {"original_max_position_embeddings": original}

    def _whole(self, tensor: StoredTensor) -> npt.NDArray[np.float32]:
        """A setting of the rotary embedding that is stored as a tensor."""
        if tensor.count > _MOST_FACTORS:
            raise InputRejected(f"{show(tensor.file)}: tensor {show(tensor.name)} has {tensor.count} rotary factors")
        return self._files[tensor.file].whole(tensor).reshape(-1).astype(np.float32)

    # --- reading --------------------------------------------------------------------------------------------

    def read(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        view = self._views[name]
        if start < 0 or start + len(out) > self.tensors[name].count:
            raise ValueError(f"items {start} to {start + len(out)} of {self.tensors[name]} are outside of the tensor")
        if view.heads is None:
            self._plainly(view, start, out)
        else:
            self._by_rows(view, start, out)
        if view.shifted:
            np.subtract(out, np.float32(1), out=out)

    def _plainly(self, view: View, start: int, out: npt.NDArray[Any]) -> None:
        file, kind = self._files[view.stored.file], view.stored.kind
        if view.shifted and kind in PLAIN and kind != "F32":
            narrow = np.empty(len(out), DTYPES[kind].storage)
            file.read(view.stored, view.first + start, narrow)
            out[:] = DTYPES[kind].as_values(narrow)
        else:
            file.read(view.stored, view.first + start, out)

    def _by_rows(self, view: View, start: int, out: npt.NDArray[Any]) -> None:
        """Whole rows at once, what is wanted of the first and the last row on its own."""
        assert view.heads is not None
        count, width = view.shape[0], view.stored.count // view.shape[0]
        done = 0
        while done < len(out):
            row, lead = divmod(start + done, width)
            whole = 0 if lead else (len(out) - done) // width
            size = whole * width or min(width - lead, len(out) - done)
            home = interleaved(np.arange(row, row + max(1, whole)), count, view.heads)
            part = out[done : done + size]
            if whole:
                self._files[view.stored.file].read_rows(view.stored, home, part.reshape(whole, width))
            else:
                self._files[view.stored.file].read(view.stored, int(home[0]) * width + lead, part)
            done += size


def _is_fact(key: str, value: Any) -> bool:
    return isinstance(value, str) and key.startswith("general.")


def _info(name: str, view: View, native: str) -> TensorInfo:
    """``offset`` is where the first byte lies, which tells the order on the disk."""
    stored = view.stored
    offset = stored.offset + view.first * stored.nbytes // max(1, stored.count)
    floating = DTYPES[view.dtype].floating
    return TensorInfo(name, view.dtype, view.shape, stored.file, offset, native if floating else view.dtype)


def _native(views: Iterable[View]) -> str:
    """The dtype that the model was most likely made in: that of most elements, bfloat16 where they are quantised.

    Vectors tell nothing: GGUF has them in float32 whatever they were.
    """
    counts: Counter[str] = Counter()
    for stored in {view.stored for view in views}:
        counts[stored.kind] += stored.count
    most = max(sorted(counts), key=counts.__getitem__)
    return most if most in ("F32", "F16", "BF16") else "BF16"


def _views(family: Family, tensor: StoredTensor, name: str | None, config: Mapping[str, Any]) -> dict[str, View]:
    """The tensors that a stored one stands for: one, or an expert each. ``name``: what it is called elsewhere."""
    what = f"{show(tensor.file)}: tensor {show(tensor.name)}"
    if name is None:
        return {tensor.name: View(tensor, 0, tensor.shape)}
    if "#" in name:
        if len(tensor.shape) != 3 or tensor.shape[0] > _MOST_EXPERTS:
            raise InputRejected(f"{what} has the shape {list(tensor.shape)}, expected a matrix for each expert")
        size = tensor.count // tensor.shape[0]
        places = {name.replace("#", str(expert)): expert * size for expert in range(tensor.shape[0])}
        return {each: View(tensor, first, tensor.shape[1:]) for each, first in places.items()}
    shape = (1, tensor.shape[-1]) if name.endswith("shared_expert_gate.weight") else tensor.shape
    heads = family.heads(tensor.name, config)
    if heads is not None and not _shares(heads, shape):
        raise InputRejected(f"{what} has the shape {list(shape)}, whose rows {show(heads)} heads cannot share")
    return {name: View(tensor, 0, shape, heads, family.is_shifted(tensor.name))}


def _shares(heads: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(heads, int) and heads > 0 and bool(shape) and shape[0] % (2 * heads) == 0


# --- files of a set -------------------------------------------------------------------------------------


def _parts(place: Place, name: str) -> list[str]:
    """All files of the set that a file belongs to, in order."""
    number = NUMBERED.fullmatch(name)
    if number is None:
        return [name]
    stem, total = number[1], int(number[3])
    parts = [f"{stem}-{part:05d}-of-{total:05d}.gguf" for part in range(1, total + 1)]
    missing = [part for part in parts if not place.has(part)]
    if missing:
        raise InputRejected(
            f"{place.shown(name)}: {len(missing)} of the {total} files of its set are missing, such as "
            f"{show(missing[0])}: download them too"
        )
    return parts


def _united(where: str, headers: list[GgufHeader]) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of all files, none twice."""
    seen = set()
    stated = headers[0].metadata.get(_SPLITS, 1)
    if not isinstance(stated, int) or max(stated, 1) != len(headers):
        raise InputRejected(f"{where} is one of {show(stated)} files, found {len(headers)}: keep the names of the set")
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in seen:
                raise InputRejected(f"{where}: tensor {show(name)} is in two files of the set")
            seen.add(name)
            yield name, tensor
    if not seen:
        raise InputRejected(f"{where} holds no tensor")
    wanted = headers[0].metadata.get("split.tensors.count", len(seen))
    if not isinstance(wanted, int) or wanted != len(seen):
        raise InputRejected(f"{where}: the set should hold {show(wanted)} tensors, found {len(seen)}")

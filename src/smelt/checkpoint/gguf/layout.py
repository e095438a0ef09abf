"""Where everything lies in a GGUF file that is to be written, known before a weight is read."""

from __future__ import annotations

import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputRejected, UsageError, show
from ...kernels.dtypes import DTYPES
from ..base import TensorInfo
from .families import FAMILY_OF, Family
from .format import (
    ALIGNMENT,
    ALIGNMENT_KEY,
    ARRAY,
    F32,
    MAGIC,
    SCALARS,
    TEXT,
    TYPE_NUMBERS,
    U32,
    aligned,
    bytes_of,
    elements_of,
)  # fmt: skip
from .header import GgufHeader
from .rotary import rope_tensors
from .settings import metadata_of
from .tokens import CHAT_TEMPLATE, Entry, template_entries, tokenizer_entries

#: What a file may be written as, and its number in ``general.file_type``.
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}

#: llama.cpp keeps tensor names in so many bytes.
_LONGEST_NAME = 63

#: Metadata of a source that do not hold for what is made of it.
_OWN = ("split.", "general.file_type", "general.quantization_version", "general.name", ALIGNMENT_KEY)

#: Tensors that hold no weight, which llama.cpp computes itself.
_BUFFERS = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")


@dataclass(frozen=True)
class Described:
    """What is known of a model beside its tensors: config, side files, and the header of a GGUF file it comes from.

    ``spelled``: the files that were made of the header's tokenizer, which is better kept as it is.
    """

    config: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)
    header: GgufHeader | None = None
    title: str = "model"
    spelled: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the files hold one, and not the header's."""
        names = [name for name in ("tokenizer.json", "tokenizer.model") if name in self.files]
        return any(self.files[name] != self.spelled.get(name) for name in names)

    @property
    def family(self) -> Family | None:
        """Its architecture in GGUF. None: a GGUF file of one that is not known, whose names are kept."""
        model = self.config.get("model_type")
        if model in FAMILY_OF:
            return FAMILY_OF[model]
        if not self.config and self.header is not None:
            return None
        known = ", ".join(FAMILY_OF)
        raise InputRejected(f"model type {show(model)} is not written to GGUF; written are {known}")


@dataclass(frozen=True)
class Placement:
    """Where the elements of a tensor go: ``offset`` bytes into the file, as ``kind``, rows of ``width``.

    ``heads``: the ``rows`` are interleaved for so many; ``shifted``: 1 is added.
    """

    kind: str
    offset: int
    rows: int
    width: int
    heads: int | None = None
    shifted: bool = False


@dataclass(frozen=True)
class GgufLayout:
    """One file to be. ``tensors`` are what a reader will find in it; their elements are brought in that dtype.

    ``fixed``: bytes at other places than the beginning, which no tensor brings.
    """

    file: str
    header: bytes
    size: int
    tensors: tuple[TensorInfo, ...]
    placements: Mapping[str, Placement]
    fixed: Mapping[int, bytes]
    notices: tuple[str, ...]


@dataclass(eq=False)
class _Stored:
    """A tensor of the file and what it is made of: one tensor, or one per expert."""

    name: str
    kind: str
    shape: tuple[int, ...]
    sources: dict[int | None, str]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return bytes_of(self.kind, prod(self.shape))


def plan_gguf(file: str, shapes: Mapping[str, tuple[int, ...]], of: Described, dtype: str) -> GgufLayout:
    """Lay out tensors (Hugging Face names and shapes; buffers are left out) in one file, matrices as ``dtype``.

    Vectors, norms and routers are float32, and matrices whose rows no blocks fill float16, as llama.cpp has them.
    Raises InputRejected for tensors that the architecture has no place for, and for what is missing.
    """
    if dtype not in FILE_TYPES:
        raise UsageError(f"GGUF is written as {', '.join(FILE_TYPES)}, not as {dtype}")
    family = of.family
    stored = _stored(family, {name: shape for name, shape in shapes.items() if not is_buffer(name)}, dtype)
    try:
        entries, notices = _entries(of, family, stored, dtype)
        extra = _rope(family, of.config)
    except ValueError as error:
        raise InputRejected(str(error)) from error
    except (KeyError, TypeError) as error:
        raise InputRejected(f"config.json lacks what GGUF needs, or has it of another type: {error}") from error
    everything = [*extra, *stored]
    for tensor, place in zip(everything, _offsets(everything), strict=True):
        tensor.offset = place
    header = _header(entries, everything)
    fixed = {len(header) + tensor.offset: data for tensor, data in extra.items()}
    placements = {name: place for tensor in stored for name, place in _places(family, of.config, tensor, len(header))}
    infos = (TensorInfo(name, _read_as(place), shapes[name], file, place.offset) for name, place in placements.items())
    size = len(header) + _end(everything)
    return GgufLayout(file, header, size, tuple(infos), placements, fixed, tuple(notices))


def is_buffer(name: str) -> bool:
    """Whether GGUF leaves a tensor out, since llama.cpp computes it."""
    return name.endswith(_BUFFERS)


def _read_as(place: Placement) -> str:
    return place.kind if place.kind in DTYPES and not place.shifted else "F32"


# --- tensors --------------------------------------------------------------------------------------------


def _stored(family: Family | None, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> list[_Stored]:
    """The tensors of the file in order, each with its sources; InputRejected with all that has no place."""
    sources: dict[str, dict[int | None, str]] = defaultdict(dict)
    problems = []
    for name in sorted(shapes):
        place = (name, None) if family is None else family.gguf(name)
        if place is None:
            problems.append(f"tensor {show(name)} has no place in the GGUF architecture {_named(family)}")
        elif len(place[0].encode()) > _LONGEST_NAME:
            problems.append(f"tensor {show(place[0])} has a name of more than {_LONGEST_NAME} bytes")
        else:
            sources[place[0]][place[1]] = name
    InputRejected.gather([*problems[:20], *([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])])
    return [_tensor(name, sources[name], shapes, dtype) for name in sorted(sources, key=_natural)]


def _named(family: Family | None) -> str:
    return "" if family is None else family.architecture


def _natural(name: str) -> list[tuple[int, str]]:
    """Layers by number, behind what belongs to none."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _tensor(name: str, sources: dict[int | None, str], shapes: Mapping[str, tuple[int, ...]], dtype: str) -> _Stored:
    shape = shapes[next(iter(sources.values()))]
    if None not in sources:
        wanted = set(range(len(sources)))
        different = {shapes[source] for source in sources.values()} != {shape}
        if sources.keys() != wanted or different:
            raise InputRejected(f"tensor {show(name)}: its {len(sources)} experts are not numbered through, or differ")
        shape = (len(sources), *shape)
    if name.endswith("ffn_gate_inp_shexp.weight"):
        shape = shape[-1:]  # one row, which others read as a vector
    if len(shape) > 4 or 0 in shape:
        raise InputRejected(f"tensor {show(name)} has the shape {list(shape)}, which GGUF does not hold")
    return _Stored(name, _kind(name, shape, dtype), shape, sources)


def _kind(name: str, shape: tuple[int, ...], dtype: str) -> str:
    inner = name.split(".")[-2] if "." in name else name
    if len(shape) < 2 or inner.endswith("_norm") or inner in ("ffn_gate_inp", "ffn_gate_inp_shexp"):
        return "F32"
    return "F16" if shape[-1] % elements_of(dtype) else dtype


def _rope(family: Family | None, config: Mapping[str, Any]) -> dict[_Stored, bytes]:
    """Settings of the rotary embedding that are tensors here."""
    found = {} if family is None else rope_tensors(family.architecture, config)
    return {_Stored(name, "F32", array.shape, {}): array.tobytes() for name, array in found.items()}


def _offsets(tensors: Iterable[_Stored]) -> list[int]:
    places, end = [], 0
    for tensor in tensors:
        places.append(end)
        end = aligned(end + tensor.nbytes, ALIGNMENT)
    return places


def _end(tensors: Sequence[_Stored]) -> int:
    return aligned(tensors[-1].offset + tensors[-1].nbytes, ALIGNMENT) if tensors else 0


def _places(
    family: Family | None, config: Mapping[str, Any], tensor: _Stored, data: int
) -> Iterable[tuple[str, Placement]]:
    heads = None if family is None else family.heads(tensor.name, config)
    shifted = family is not None and family.is_shifted(tensor.name)
    shape = tensor.shape if None in tensor.sources else tensor.shape[1:]
    rows, width = (shape[0], prod(shape[1:])) if shape else (1, 1)
    if heads is not None and rows % (2 * heads):
        raise InputRejected(f"tensor {show(tensor.sources[None])}: its {rows} rows are not those of {heads} heads")
    size = bytes_of(tensor.kind, rows * width)
    for expert, name in sorted(tensor.sources.items(), key=lambda item: item[0] or 0):
        yield name, Placement(tensor.kind, data + tensor.offset + (expert or 0) * size, rows, width, heads, shifted)


# --- the header -----------------------------------------------------------------------------------------


def _entries(
    of: Described, family: Family | None, stored: Sequence[_Stored], dtype: str
) -> tuple[list[Entry], list[str]]:
    """Every metadata entry once, the architecture first; and what there is to tell of them."""
    templates = [] if of.header is None else list(template_entries(of.files))
    left = (*_OWN, *(["tokenizer."] if of.has_tokenizer else [CHAT_TEMPLATE] if templates else []))
    inherited = {} if of.header is None else of.header.metadata
    kinds = {} if of.header is None else of.header.kinds
    found = {key: (kinds[key], value) for key, value in inherited.items() if not key.startswith(left)}
    said: list[Entry] = [*templates, ("general.type", TEXT, "model"), ("general.name", TEXT, of.title)]
    said.append(("general.file_type", U32, FILE_TYPES[dtype]))
    if any(tensor.kind == "Q8_0" for tensor in stored):
        said.append(("general.quantization_version", U32, 2))
    if family is not None:
        config = {**of.config, "vocab_size": _rows(stored)}
        said = [("general.architecture", TEXT, family.architecture), *said, *metadata_of(family, config)]
        if config["model_type"] == "mistral":  # which the architecture does not tell from Llama
            said.append(("general.basename", TEXT, "mistral"))
    notices = []
    if family is not None and not any(key.startswith("tokenizer.") for key in found):
        tokens = tokenizer_entries(of.files, of.config, _rows(stored))
        notices = [] if tokens else ["there is no tokenizer to write to GGUF: llama.cpp will take token ids only"]
        said += tokens or [("tokenizer.ggml.model", TEXT, "none")]
    found |= {key: (kind, value) for key, kind, value in said}
    return [(key, kind, value) for key, (kind, value) in found.items()], notices


def _rows(stored: Sequence[_Stored]) -> int:
    rows = next((tensor.shape[0] for tensor in stored if tensor.name == "token_embd.weight"), None)
    if rows is None:
        raise ValueError("a model without an embedding of tokens is not written to GGUF")
    return rows


def _header(entries: Sequence[Entry], tensors: Sequence[_Stored]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(entries))]
    parts += [_text(key) + _value(key, kind, value) for key, kind, value in entries]
    for tensor in tensors:
        sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        parts.append(_text(tensor.name) + sizes + struct.pack("<IQ", TYPE_NUMBERS[tensor.kind], tensor.offset))
    whole = b"".join(parts)
    return whole + bytes(-len(whole) % ALIGNMENT)


def _text(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, kind: int, value: Any) -> bytes:
    """A value with its type in front; a sequence of values with its length too."""
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        return struct.pack("<I", kind) + _one(key, kind, value)
    head = struct.pack("<IIQ", ARRAY, kind, len(value))
    if kind == TEXT:
        return head + b"".join(map(_text, value))
    return head + np.asarray(value).astype("<" + SCALARS[kind]).tobytes()


def _one(key: str, kind: int, value: Any) -> bytes:
    if kind == TEXT:
        return _text(value)
    try:
        return struct.pack("<" + SCALARS[kind], float(value) if kind == F32 else value)
    except (struct.error, TypeError, ValueError, OverflowError) as error:
        raise InputRejected(f"{key} = {show(value)} is not written to GGUF: {error}") from error


def file_name(path: Path) -> str:
    """The name of a GGUF file. UsageError where it is called otherwise."""
    if path.suffix != ".gguf":
        raise UsageError(f"{show(path.name)} is no name of a GGUF file: expected one that ends in .gguf")
    return path.name

"""Which files of a folder are its weights. Where that is not clear, nothing is guessed.

In order: an index, one file of a well-known name, a complete numbered set, the only file of weights. Pickled
files count where they may be read and there is no safetensors file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputRejected, show
from .documents import brief
from .place import Place

#: What weight files are called, apart from their number; the first is transformers' name.
STEMS = ("model", "diffusion_pytorch_model", "open_clip_model")

MAX_SHARDS = 10_000

#: A shard's name: stem, number, total, ending.
NUMBERED = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})(\.safetensors|\.bin)", re.ASCII)

_ADAPTER = "adapter_model."

#: The weights of an adapter, which are no model's.
ADAPTER = "adapter_model.safetensors"
PICKLED_ADAPTER = "adapter_model.bin"

#: What diffusers calls the adapter of a pipeline.
DIFFUSERS_ADAPTER = "pytorch_lora_weights.safetensors"

#: Pickled files that lie beside weights and are none.
_BESIDE = (_ADAPTER, "training_args.", "optimizer.", "scheduler.", "scaler.", "rng_state")


@dataclass(frozen=True)
class Kind:
    """A format of weight files: how their names end, and how they and their index are called."""

    endings: tuple[str, ...]
    stems: tuple[str, ...]
    index: str

    def has(self, name: str) -> bool:
        """Whether a file is named as weights of a model."""
        return name.endswith(self.endings) and not name.startswith(_BESIDE)

    def single(self, names: Iterable[str]) -> str | None:
        """The file of a well-known name among ``names``."""
        known = (f"{stem}{ending}" for stem in self.stems for ending in self.endings)
        return next((name for name in known if name in names), None)


SAFETENSORS = Kind((".safetensors",), STEMS, ".safetensors.index.json")
PICKLED = Kind(
    (".bin", ".pt", ".pth", ".ckpt"),
    ("pytorch_model", "diffusion_pytorch_model", "open_clip_pytorch_model"),
    ".bin.index.json",
)

PICKLE_ADVICE = (
    "is pickled: --allow-pickle reads its tensors without running what is in it, and smelt convert makes safetensors "
    "of it"
)
ADAPTER_ADVICE = "is an adapter, not a model: name the base that it belongs to as base+adapter"

#: What the files of a copy are called, by how those of the original are: a pickle's copy is none.
_STEMS = {stem: stem for stem in STEMS} | dict(zip(PICKLED.stems, STEMS, strict=True))

#: What comes after the stem: a number, a variant such as fp16, an ending.
_AFTER_STEM = re.compile(r"[-.].*", re.ASCII)

WeightMap = Mapping[str, str]


class AdapterGiven(InputRejected):
    """What was to be a model is an adapter."""


def choose(place: Place, *, pickled: bool = False) -> tuple[list[str], WeightMap | None]:
    """The names of the weight files, and the index's map from tensor to file where there is one.

    ``pickled``: whether pickled files may be chosen. Raises InputRejected when there are none, when it is not
    clear which are meant, or when some are missing.
    """
    names = place.names()
    kind = kind_of(names, pickled)
    weights = [name for name in names if kind.has(name)]
    indices = _indices(names, kind)
    single = kind.single(weights)
    if indices:
        return _from_index(place, indices, single, pickled)
    if not weights:
        raise nothing_in(place.shown(), names)
    numbered = [match for name in weights if (match := NUMBERED.fullmatch(name))]
    if single and not any(match[1] == Path(single).stem for match in numbered):
        return [single], None
    if len(weights) == len(numbered):
        return _complete_set(place, numbered), None
    if len(weights) > 1:
        raise InputRejected(f"{place.shown()} holds {_several(weights)}: {_choice(place, single or weights[0])}")
    return weights, None


def stem_of(name: str) -> str:
    """What the files of a copy of these weights are called: as a library looks for them, else as transformers does."""
    return next((copy for stem, copy in _STEMS.items() if _AFTER_STEM.fullmatch(name.removeprefix(stem))), STEMS[0])


def kind_of(names: Sequence[str], pickled: bool) -> Kind:
    """Safetensors wherever there are any."""
    plain = any(SAFETENSORS.has(name) or name.endswith(SAFETENSORS.index) for name in names)
    return PICKLED if pickled and not plain else SAFETENSORS


def _indices(names: Iterable[str], kind: Kind) -> list[str]:
    found = [name for name in names if name.endswith(kind.index)]
    known = [f"{stem}{kind.index}" for stem in kind.stems if f"{stem}{kind.index}" in found]
    return known or found


def _several(names: Sequence[str]) -> str:
    shown = ", ".join(show(name) for name in names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def _choice(place: Place, name: str) -> str:
    return f"give the path of the one that is meant, such as {place.shown(name)}, or remove the others"


def nothing_in(where: str, names: Sequence[str]) -> InputRejected:
    """The error that says what a folder without safetensors weights holds, and what to do about it."""
    if any(name.startswith((_ADAPTER, "adapter_config.")) for name in names):
        return AdapterGiven(f"{where} {ADAPTER_ADVICE}")
    return InputRejected(f"{where} {_what_else(names)}")


def _what_else(names: Sequence[str]) -> str:
    pickles = [name for name in names if PICKLED.has(name)]
    if pickles:
        return f"holds no safetensors file; {show(pickles[0])} {PICKLE_ADVICE}"
    if any(name.endswith(".gguf") for name in names):
        return "holds GGUF: give the path of the file that is meant"
    if "model_index.json" in names:
        return "is a diffusers pipeline: give one of its parts here, such as the folder unet or transformer in it"
    if any(name.endswith(".incomplete") for name in names):
        return "holds an unfinished download: finish it"
    return "holds no weights: expected model.safetensors, or shards with model.safetensors.index.json"


# --- with an index --------------------------------------------------------------------------------------


def _from_index(place: Place, indices: Sequence[str], single: str | None, pickled: bool) -> tuple[list[str], WeightMap]:
    if len(indices) > 1:
        raise InputRejected(f"{place.shown()} holds {_several(indices)}: {_choice(place, indices[0])}")
    files, weight_map = read_index(place, indices[0], pickled=pickled)
    if single is not None and files != [single]:
        raise InputRejected(
            f"{place.shown()} holds {show(single)} and {show(indices[0])}, two models of which one is stale: "
            + _choice(place, indices[0])
        )
    return files, weight_map


def read_index(place: Place, name: str, *, pickled: bool = False) -> tuple[list[str], WeightMap]:
    """The files that an index names, sorted, and its map from tensor to file. Raises InputRejected."""
    where = place.shown(name)
    weight_map = place.json(name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputRejected(f"{where}: weight_map is {brief(weight_map)}, expected an object of file names")
    problems = (
        f"{where}: weight_map sends {show(tensor)} to {brief(file)}, {problem}"
        for tensor, file in weight_map.items()
        if (problem := _file_name_problem(file, pickled))
    )
    if (first := next(problems, None)) is not None:
        raise InputRejected(first)
    files = sorted(set(weight_map.values()))
    if len(files) > MAX_SHARDS:
        raise InputRejected(f"{where} names {len(files)} files, at most {MAX_SHARDS} are accepted")
    _refuse_missing(place, files)
    return files, weight_map


def _file_name_problem(file: object, pickled: bool) -> str | None:
    """What makes it anything but the name of a file of weights in the same folder."""
    if not isinstance(file, str):
        return "expected the name of a file"
    if not file.isprintable() or len(file) > 255 or any(mark in file for mark in "/\\:") or file.startswith("."):
        return "expected the plain name of a file in the same folder"
    if file.endswith(PICKLED.endings):
        return None if pickled else f"which {PICKLE_ADVICE}"
    return None if file.endswith(SAFETENSORS.endings) else "expected a .safetensors file"


# --- without one ----------------------------------------------------------------------------------------


def _complete_set(place: Place, numbered: Sequence[re.Match[str]]) -> list[str]:
    """All files of one numbered set, none of which may be missing."""
    sets = sorted({(match[1], match[3], match[4]) for match in numbered})
    if len(sets) > 1:
        kinds = _several([f"{stem}-...-of-{total}{ending}" for stem, total, ending in sets])
        raise InputRejected(
            f"{place.shown()} holds shards of several sets ({kinds}) and no index: remove the stale ones"
        )
    (stem, total, ending), width = sets[0], len(numbered[0][2])
    if not 0 < int(total) <= MAX_SHARDS:
        raise InputRejected(f"{place.shown()}: {show(numbered[0][0])} counts shards beyond {MAX_SHARDS}")
    wanted = [f"{stem}-{number:0{width}d}-of-{total}{ending}" for number in range(1, int(total) + 1)]
    _refuse_missing(place, wanted)
    return wanted


def _refuse_missing(place: Place, files: Iterable[str]) -> None:
    names = set(place.names())
    missing = [file for file in files if file not in names]
    if missing:
        unfinished = ", a download is unfinished" if place.unfinished(names) else ""
        raise InputRejected(
            f"{place.shown()}: {len(missing)} of its weight files are missing ({_several(missing)})"
            f"{unfinished}: download the model again"
        )


def gguf_file(place: Place, name: str | None) -> str | None:
    """The GGUF file that is meant: the one that is named, or the only one of a folder that has no other weights."""
    if name is not None:
        return name if name.endswith(".gguf") else None
    names = place.names()
    found = [name for name in names if name.endswith(".gguf")]
    if any(kind.has(name) or name.endswith(kind.index) for kind in (SAFETENSORS, PICKLED) for name in names):
        return None
    sets = {re.sub(r"-\d{5}-of-", "-of-", name) for name in found}
    return found[0] if len(sets) == 1 else None


def adapter_file(place: Place, *, pickled: bool = False) -> str:
    """The weights in an adapter's folder, whether they are there or not. InputRejected for those not to be read."""
    if place.has(ADAPTER) or not place.has(PICKLED_ADAPTER):
        return ADAPTER
    if not pickled:
        raise InputRejected(
            f"{place.shown(PICKLED_ADAPTER)} is pickled: --allow-pickle reads its tensors without running what is in it"
        )
    return PICKLED_ADAPTER


def refuse_other_formats(place: Place, name: str, *, pickled: bool = False) -> None:
    """Say of a single file that it is an adapter, or pickled, where its name tells."""
    where = place.shown(name)
    if name.startswith(_ADAPTER):
        raise AdapterGiven(f"{where} {ADAPTER_ADVICE}")
    if name.endswith(PICKLED.endings) and not pickled:
        raise InputRejected(f"{where} {PICKLE_ADVICE}")

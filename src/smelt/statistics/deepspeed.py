"""The optimizer state of DeepSpeed ZeRO, stages 1 to 3, from the files of all ranks.

Stages 1 and 2 flatten each parameter group and cut it into one piece per rank, padded at the end. Stage 3 cuts
each parameter into pieces of ceil(n / ranks) elements, one per rank, padded parameter by parameter. Names and
shapes stand in the files of the model's state.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from .. import storage
from ..checkpoint.torch_file import TorchFile
from ..errors import InputRejected
from .assembled import Ribbon, Stretch

_RANK = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_0_)?mp_rank_00_model_states\.pt")

Placed = dict[str, tuple[tuple[int, ...], list[Stretch]]]


def is_zero(folder: Path) -> bool:
    """Whether a folder holds the optimizer states of ranks."""
    return any(_RANK.fullmatch(name) for name in storage.listdir(folder))


def read_zero(folder: Path, files: list[TorchFile], kind: str) -> tuple[Placed, Mapping[str, Any]]:
    """Where each parameter's ``kind`` lies, and the options of its first group. Opened ``files`` are appended."""
    states = [_optimizer(folder, name, files) for name in _ranks(folder)]
    shapes = _shapes(folder, files)
    stage = states[0].get("zero_stage", 1)
    inner = [state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"] for state in states]
    if not all(isinstance(state, Mapping) and "state" in state for state in inner):
        raise InputRejected(f"{storage.shown(folder)}: an elastic optimizer state, which this version does not read")
    moments = [[group[kind] for _, group in sorted(state["state"].items())] for state in inner]
    place = _whole_parameters if stage == 3 else _whole_groups
    return dict(place(shapes, moments)), inner[0]["param_groups"][0]


def _ranks(folder: Path) -> list[str]:
    """The files of all ranks, in order."""
    found = {int(m[1]): m for name in storage.listdir(folder) if (m := _RANK.fullmatch(name))}
    where = storage.shown(folder)
    if any(int(match[2]) for match in found.values()):
        raise InputRejected(f"{where}: tensor-parallel ranks, which this version does not read")
    if sorted(found) != list(range(len(found))):
        raise InputRejected(f"{where}: ranks {sorted(found)} are there, expected all from 0: copy the others too")
    return [found[rank][0] for rank in sorted(found)]


def _optimizer(folder: Path, name: str, files: list[TorchFile]) -> Mapping[str, Any]:
    files.append(TorchFile(folder / name))
    return files[-1].content["optimizer_state_dict"]  # type: ignore[no-any-return]


def _shapes(folder: Path, files: list[TorchFile]) -> Sequence[Mapping[str, tuple[int, ...]]]:
    """Per group: parameter -> shape, in the order in which they are laid out."""
    name = next((name for name in storage.listdir(folder) if _MODEL.fullmatch(name)), None)
    if name is None:
        raise InputRejected(f"{storage.shown(folder)} has no model_states file, which names the parameters")
    files.append(TorchFile(folder / name))
    return files[-1].content["param_shapes"]  # type: ignore[no-any-return]


def _whole_groups(
    shapes: Sequence[Mapping[str, tuple[int, ...]]], moments: Sequence[Sequence[Any]]
) -> Iterator[tuple[str, tuple[tuple[int, ...], list[Stretch]]]]:
    for group, named in enumerate(shapes):
        ribbon, start = Ribbon(rank[group] for rank in moments), 0
        for name, shape in named.items():
            yield name, (tuple(shape), ribbon.cut(start, prod(shape)))
            start += prod(shape)


def _whole_parameters(
    shapes: Sequence[Mapping[str, tuple[int, ...]]], moments: Sequence[Sequence[Any]]
) -> Iterator[tuple[str, tuple[tuple[int, ...], list[Stretch]]]]:
    ribbons, start = [Ribbon(rank) for rank in moments], 0
    for name, shape in (item for named in shapes for item in named.items()):
        count = prod(shape)
        piece = -(-count // len(ribbons))
        parts = [ribbon.cut(start, max(0, min(piece, count - rank * piece))) for rank, ribbon in enumerate(ribbons)]
        yield name, (tuple(shape), [stretch for part in parts for stretch in part])
        start += piece

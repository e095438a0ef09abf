"""The checkpoint that shows logical tensors in place of quantised ones, and what cannot be shown so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ...errors import InputRejected, show
from ...kernels.dtypes import DTYPES
from ...storage import FileIdentity
from ..base import Checkpoint
from ..pipeline import PipelineCheckpoint
from ..quantisation import CODES, COMPANIONS, Settings, settings_of, without_quantisation
from .bitsandbytes import bitsandbytes_groups
from .compressed import compressed_groups
from .fp4 import expert_groups, modelopt_groups
from .gptq import awq_groups, gptq_groups
from .matrix import Matrix
from .scaled import fp8_groups
from .stored import Group, Stored
from .turned import HELD, Bands, Turned

Finder = Callable[[Stored, Settings, Bands], Iterator[Group]]


def _alone(*finders: Callable[[Stored, Settings], Iterator[Group]]) -> Finder:
    """Finders that need no bands, one after another."""
    return lambda stored, settings, bands: (group for find in finders for group in find(stored, settings))


def _untold(stored: Stored, settings: Settings, bands: Bands) -> Iterator[Group]:
    """What tensors tell without a config."""
    yield from _alone(fp8_groups, modelopt_groups, bitsandbytes_groups)(stored, settings, bands)
    yield from expert_groups(stored, settings, bands)


#: ``quant_method`` of config.json -> what finds the groups.
_SCHEMES: dict[str, Finder] = {
    "fp8": _alone(fp8_groups), "fbgemm_fp8": _alone(fp8_groups), "modelopt": _alone(fp8_groups, modelopt_groups),
    "compressed-tensors": _alone(compressed_groups), "bitsandbytes": _alone(bitsandbytes_groups),
    "gptq": gptq_groups, "awq": awq_groups, "mxfp4": expert_groups,
}  # fmt: skip

#: The last parts of names of what concerns activations alone.
_ACTIVATIONS = {
    "input_scale", "input_scale_ub", "input_zero_point", "input_global_scale", "activation_scale", "output_scale",
    "output_zero_point", "k_scale", "v_scale", "q_scale", "kv_scale", "k_zero_point", "v_zero_point",
    "prob_output_scale",
}  # fmt: skip


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its quantised tensors as logical ones; itself where there are none that are understood.

    Raises InputRejected when quantised tensors are incomplete or do not fit together.
    """
    settings = settings_of(checkpoint.config)
    method = settings.get("quant_method")
    find = _untold if not settings else _SCHEMES.get(method) if isinstance(method, str) else None
    if find is None:
        return checkpoint
    stored = Stored(checkpoint)
    groups = list(find(stored, settings, Bands()))
    return Dequantised(stored, groups, method or "no quantization_config") if groups else checkpoint


def refusals(checkpoint: Checkpoint) -> Iterator[str]:
    """Why a checkpoint is not made of weights: that it is quantised in a way that was not understood."""
    if isinstance(checkpoint, PipelineCheckpoint):
        for folder, part in checkpoint.opened.items():
            yield from (f"{folder or 'top'}: {problem}" for problem in refusals(part))
        return
    settings = settings_of(checkpoint.config)
    if settings:
        method = settings.get("quant_method", "unknown")
        if isinstance(method, str) and method in _SCHEMES:
            yield (
                f"{checkpoint.label}: a quantised checkpoint ({show(method)}) by its config.json, and no tensor is: "
                "remove quantization_config from it if the weights are plain"
            )
        else:
            known = ", ".join(sorted(_SCHEMES))
            yield f"{checkpoint.label}: a quantised checkpoint ({show(method)}), this version reads {known}"
        return
    for name, info in checkpoint.tensors.items():
        where = f"{checkpoint.label}: tensor {show(name)} in {show(info.file)} is"
        if DTYPES[info.dtype].floating and not DTYPES[info.dtype].arithmetic:
            yield f"{where} {info.dtype}, a quantised payload without a scale: dequantise the model first"
            return
        scheme = next((scheme for ending, scheme in CODES.items() if name.endswith(ending)), None)
        if scheme is not None:
            yield f"{where} a part of {scheme}: its config.json with quantization_config is missing"
            return


class Dequantised(Checkpoint):
    """Quantised tensors under the names, shapes and dtypes of the weights that they stand for, and all plain ones."""

    def __init__(self, stored: Stored, groups: list[Group], method: str) -> None:
        inner = stored.checkpoint
        self.stored = inner
        self.label, self.folder, self.revision = inner.label, inner.folder, inner.revision
        self.metadata, self.config = inner.metadata, without_quantisation(inner.config)
        self.parts, self.beside = inner.parts, inner.beside
        turned = any(isinstance(group.reader, Turned) for group in groups)
        self.scratch, self.held = inner.scratch, inner.held + (HELD if turned else 0)
        self._readers = {group.info.name: group.reader for group in groups}
        taken = {part for group in groups for part in group.parts}
        dropped = {name for name in inner.tensors.keys() - taken if name.rpartition(".")[2] in _ACTIVATIONS}
        plain = {name: info for name, info in inner.tensors.items() if name not in taken | dropped}
        InputRejected.gather(_left_over(stored, plain))
        logical = {group.info.name: group.info for group in groups}
        self.tensors = dict(sorted((plain | logical).items()))
        also = f"; {len(dropped)} scales of activations are left out" if dropped else ""
        what = f"{len(groups)} quantised weights ({method}) are dequantised as they are read{also}"
        self.notices = [*inner.notices, what]

    def read(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        reader = self._readers.get(name)
        if reader is None:
            self.stored.read(name, start, out)
            return
        if start < 0 or start + len(out) > self.tensors[name].count:
            raise ValueError(f"items {start} to {start + len(out)} of {self.tensors[name]} are outside of the tensor")
        reader.read(start, out)

    def float8(self, name: str) -> Matrix | None:
        """How a tensor is read that is stored as FP8 (E4M3) beside scales; None where it is not."""
        reader = self._readers.get(name)
        if isinstance(reader, Matrix) and self.stored.tensors[reader.codes.name].dtype == "F8_E4M3":
            return reader
        return None

    @property
    def side_files(self) -> Mapping[str, bytes]:
        return self.stored.side_files

    def strip(self) -> None:
        super().strip()
        self.stored.strip()

    def folders(self) -> list[Path]:
        return self.stored.folders()

    def check_unchanged(self) -> None:
        self.stored.check_unchanged()

    def files(self) -> list[FileIdentity]:
        return self.stored.files()

    def close(self) -> None:
        self.stored.close()


def _left_over(stored: Stored, plain: Mapping[str, Any]) -> Iterator[str]:
    """Tensors that are no weights and that no group took."""
    for name, info in plain.items():
        if DTYPES[info.dtype].floating and not DTYPES[info.dtype].arithmetic:
            yield str(stored.rejected(info, f"is {info.dtype} and has no scale: download the model again"))
        elif name.endswith(COMPANIONS):
            yield str(stored.rejected(info, "belongs to a quantised weight that is not there: download it again"))

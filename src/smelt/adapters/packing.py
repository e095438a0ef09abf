"""Delta packs: a fine-tune as what few elements, or one bit for each, say of its difference from the base."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..checkpoint import TensorInfo
from ..checkpoint.adapter import CONFIG, PACK
from ..engine.artefact import Source, Work, open_models
from ..engine.card import public_name
from ..engine.progress import Progress
from ..errors import InputRejected, UsageError, show
from ..kernels.dtypes import DTYPES, NAMES, rounded
from ..kernels.program import Operand
from ..kernels.random import key_of
from .combinations import drawn_from, largest
from .lowrank import Array
from .making import Maker, Means, Part
from .outlook import AdapterPlan, Outlook
from .pair import Pair
from .report import AdapterArtifact, ModuleReport, Stored, pack_card

Parts = dict[str, Array]

_STRETCH = 1 << 20


@dataclass(frozen=True)
class PackOptions:
    """The options of :func:`smelt.extract_delta`, as they are described there."""

    form: Literal["sparse", "sign"]
    density: float | None = None
    prune: Literal["magnitude", "random"] | None = None
    seed: int = 0
    value_dtype: str = "float32"

    def problems(self) -> Iterator[str]:
        if self.form not in ("sparse", "sign"):
            yield f"form must be sparse or sign, not {show(self.form)}"
        if self.form == "sparse" and (self.density is None or not 0 < self.density <= 1):
            yield f"form: sparse needs density, the share of elements to keep, in (0, 1], not {self.density}"
        if self.form == "sign" and (self.density is not None or self.prune is not None):
            yield "density and prune have no effect with form: sign, which keeps a bit of every element"
        if self.prune not in (None, "magnitude", "random"):
            yield f"prune must be magnitude or random, not {show(self.prune)}"
        if self.value_dtype not in NAMES:
            yield f"value_dtype must be float32, bfloat16, float16 or float64, not {show(self.value_dtype)}"


def extract_delta(
    base: Source, model: Source, out: str | Path, *, form: Literal["sparse", "sign"], density: float | None = None,
    prune: Literal["magnitude", "random"] | None = None, seed: int = 0, value_dtype: str = "float32",
    allow_pickle: bool = False, threads: int | None = None, memory: str | int = "4GiB",
    progress: Progress | None = None,
) -> AdapterArtifact:  # fmt: skip
    """Publish what leads from ``base`` to ``model``, packed, as the new folder ``out``; ``base+out`` reads it back.

    Parameters
    ----------
    base, model: folders, files, hub ids, or dicts of arrays.
    form: "sparse", single elements of the difference with their places; or "sign", for every element the sign of
        its difference and for every tensor their mean magnitude, which is the best scale for them (Liu et al.,
        "BitDelta", NeurIPS 2024, https://arxiv.org/abs/2402.10193, before its distillation).
    density: of form "sparse", the share of elements of each tensor that is kept.
    prune: which: the largest in magnitude, as they are (default); or "random", each with probability ``density``
        and divided by it (DARE, Yu et al., ICML 2024, https://arxiv.org/abs/2311.03099).
    seed: of the draws.
    value_dtype: of the kept values ("float32", "bfloat16", ...).
    allow_pickle: read pickled weights, too, where there are no others.
    threads, memory: as many tensors at once as there are threads, as far as the memory allows.

    Tensors of less than two axes are stored whole, as differences. The error of every tensor is told.
    Raises UsageError, InputRejected or OperationFailed; then ``out`` does not exist.
    """
    out = Path(out)
    options = PackOptions(form, density, prune, seed, value_dtype)
    UsageError.gather(options.problems())
    with _packer(base, model, out, options, allow_pickle) as packer:
        return packer.make(out, Means.of(threads, memory, progress))


def plan_extract_delta(
    base: Source, model: Source, out: str | Path, *, allow_pickle: bool = False, threads: int | None = None,
    memory: str | int = "4GiB", **options: Any,
) -> AdapterPlan:  # fmt: skip
    """What :func:`extract_delta` would do with these options: everything is checked, and nothing written."""
    asked = PackOptions(**options)
    UsageError.gather(asked.problems())
    with _packer(base, model, Path(out), asked, allow_pickle) as packer:
        return packer.plan(Means.of(threads, memory, None))


@contextmanager
def _packer(
    base: Source, model: Source, out: Path, options: PackOptions, allow_pickle: bool
) -> Iterator[_Packer]:  # fmt: skip
    """With both models open, and a destination that will do."""
    settings = {name: getattr(options, name) for name in ("form", "density", "prune", "value_dtype")}
    work = Work("extract_delta", settings, open_models(allow_pickle, base=base, model=model), options.seed)
    with work.towards(out):
        yield _Packer(work, options)


def length(values: Array) -> float:
    """Euclidean norm of float32 values (n,), in fp64 a stretch at a time."""
    parts = (values[start : start + _STRETCH].astype(np.float64) for start in range(0, len(values), _STRETCH))
    return sqrt(sum(float(np.vdot(part, part)) for part in parts))


class _Packer(Maker[TensorInfo]):
    """Packs every tensor, and makes a folder of them."""

    label = "packing"

    def __init__(self, work: Work, options: PackOptions) -> None:
        super().__init__(work)
        self._options, self._pair = options, Pair(work)
        tensors = self._pair.model.checkpoint.tensors
        self.units = [tensors[name] for name in sorted(tensors) if DTYPES[tensors[name].dtype].arithmetic]
        InputRejected.gather(self._problems())

    def _problems(self) -> Iterator[str]:
        """A difference has the shape of what it is added to."""
        base = self._pair.base
        for info in self.units:
            twin = base.checkpoint.tensors.get(info.name)
            if twin is None or twin.shape != info.shape:
                found = "not stored" if twin is None else str(list(twin.shape))
                where = f"{found} in {base.label}"
                yield f"tensor {show(info.name)} is {list(info.shape)}, and {where}: resize the base first"

    def memory(self, unit: TensorInfo) -> int:
        return 28 * unit.count + 1

    def nbytes(self, unit: TensorInfo) -> int:
        return unit.nbytes

    def reads(self, unit: TensorInfo) -> int:
        return self._pair.reads([unit.name])

    def outlook(self, unit: TensorInfo) -> Outlook:
        stored = self._form(unit)
        size = DTYPES[NAMES[self._options.value_dtype]].bits // 8
        if stored == "signs":
            nbytes = -(-unit.count // 8) + 4
        else:
            kept = unit.count if stored == "whole" else ceil(float(self._options.density or 1) * unit.count)
            nbytes = kept * (size + (4 if stored == "entries" else 0))
        return Outlook(unit.name, stored, 0, nbytes, nbytes)

    def _form(self, info: TensorInfo) -> Stored:
        """How a tensor that differs is stored."""
        if len(info.shape) < 2 or info.count >= 1 << 32:
            return "whole"
        return "signs" if self._options.form == "sign" else "entries"

    def part(self, unit: TensorInfo) -> Part:
        delta = self._pair.offset(unit.name).reshape(-1).astype(np.float32)
        norm = length(delta)
        if not norm:
            return Part(ModuleReport(unit.name, "nothing", 0, 0.0, 0.0, why="equal"))
        stored, parts = self._parts(unit, delta)
        tensors = {f"{unit.name}::{part}": self.keep(array) for part, array in parts.items() if array.size}
        return Part(ModuleReport(unit.name, stored, 0, norm, length(delta)), tensors)

    def _parts(self, info: TensorInfo, delta: Array) -> tuple[Stored, Parts]:
        """How a difference (n,) is stored, and its parts, which are taken from ``delta``."""
        code = NAMES[self._options.value_dtype]
        stored = self._form(info)
        if stored == "whole":
            whole = rounded(delta.astype(np.float64), code)
            delta -= whole
            return stored, {"delta": whole.reshape(info.shape)}
        if stored == "signs":
            scale = np.float32(np.abs(delta).mean(dtype=np.float64))
            bits = delta >= 0
            delta -= np.where(bits, scale, -scale)
            return stored, {"sign": np.packbits(bits), "scale": np.array([scale])}
        density = float(self._options.density or 1)
        if self._options.prune == "random":
            kept = drawn_from(delta, density, key_of(self._options.seed, info.name, 0))
        else:
            kept = largest(delta, density)
        index = np.flatnonzero(kept)
        values = rounded(kept[index].astype(np.float64), code)
        delta[index] -= values
        return stored, {"index": index.astype(np.uint32), "value": values}

    def emptiness(self) -> str:
        return f"nothing to pack: {self._pair.model.label} is {self._pair.base.label}"

    def files(self, title: str, parts: Sequence[Part], tensors: Mapping[str, Operand]) -> Mapping[str, bytes]:
        name = public_name(self._pair.base.label, self._pair.base.is_local)
        content: dict[str, Any] = {"peft_type": PACK, "base_model_name_or_path": name, "inference_mode": True}
        card = pack_card(title, name, self._options.form, [part.report for part in parts])
        return {CONFIG: (json.dumps(content, indent=2) + "\n").encode(), "README.md": card.encode()}

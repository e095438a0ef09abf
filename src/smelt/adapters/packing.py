"""Delta packs: a fine-tune as what few elements, or one bit for each, say of its difference from the base."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..checkpoint import ADAPTER, TensorInfo, plan_file
from ..checkpoint.adapter import CONFIG, PACK
from ..engine.artefact import Source, Work, open_models, publish
from ..engine.card import public_name
from ..engine.execute import usable_cores
from ..engine.progress import Progress, Silent
from ..engine.publish import check_destination
from ..engine.spool import Spool
from ..errors import InputRejected, UsageError, show
from ..kernels.dtypes import DTYPES, NAMES, rounded
from ..kernels.program import Operand
from ..kernels.random import key_of
from ..recipe import parse_size
from .combinations import drawn_from, largest
from .lowrank import Array
from .pair import Pair
from .pool import for_each
from .report import AdapterArtifact, ModuleReport, Stored, pack_card

Parts = dict[str, Array]

_STRETCH = 1 << 20


@dataclass(frozen=True)
class PackOptions:
    """The options of :func:`smelt.extract_delta`, as they are described there."""

    form: Literal["sparse", "sign"]
    density: float | None
    prune: Literal["magnitude", "random"] | None
    seed: int
    value_dtype: str

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


@dataclass
class Packed:
    report: ModuleReport
    tensors: Mapping[str, Operand] = field(default_factory=dict)


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
    settings = {name: getattr(options, name) for name in ("form", "density", "prune", "value_dtype")}
    opened = open_models(allow_pickle, base=base, model=model)
    work = Work("extract_delta", settings, opened, seed)
    try:
        check_destination(out, work.folders())
        with Spool(out.absolute().parent) as spool:
            packer = _Packer(work, options, spool)
            found = packer.run(threads or usable_cores(), parse_size(memory), progress or Silent())
            return packer.publish(out, found, threads, progress)
    finally:
        work.close()


def length(values: Array) -> float:
    """Euclidean norm of float32 values (n,), in fp64 a stretch at a time."""
    parts = (values[start : start + _STRETCH].astype(np.float64) for start in range(0, len(values), _STRETCH))
    return sqrt(sum(float(np.vdot(part, part)) for part in parts))


class _Packer:
    """Packs every tensor, and makes a folder of them."""

    def __init__(self, work: Work, options: PackOptions, spool: Spool) -> None:
        self._work, self._options, self._spool = work, options, spool
        self._pair = Pair(work)
        tensors = self._pair.model.checkpoint.tensors
        self.tensors = [tensors[name] for name in sorted(tensors) if DTYPES[tensors[name].dtype].arithmetic]
        InputRejected.gather(self._problems())

    def _problems(self) -> Iterator[str]:
        """A difference has the shape of what it is added to."""
        base = self._pair.base
        for info in self.tensors:
            twin = base.checkpoint.tensors.get(info.name)
            if twin is None or twin.shape != info.shape:
                found = "not stored" if twin is None else str(list(twin.shape))
                where = f"{found} in {base.label}"
                yield f"tensor {show(info.name)} is {list(info.shape)}, and {where}: resize the base first"

    def run(self, threads: int, memory: int, progress: Progress) -> list[Packed]:
        """All tensors in the order of their names, many at once."""
        return for_each(
            self.tensors, self._packed, needs=lambda info: 28 * info.count + 1, nbytes=lambda info: info.nbytes,
            threads=threads, memory=memory, progress=progress, label="packing",
        )  # fmt: skip

    def _packed(self, info: TensorInfo) -> Packed:
        delta = self._pair.offset(info.name).reshape(-1).astype(np.float32)
        norm = length(delta)
        if not norm:
            return Packed(ModuleReport(info.name, "nothing", 0, 0.0, 0.0, why="equal"))
        stored, parts = self._parts(info, delta)
        report = ModuleReport(info.name, stored, 0, norm, length(delta))
        return Packed(
            report, {f"{info.name}::{part}": self._spool.put(array) for part, array in parts.items() if array.size}
        )

    def _parts(self, info: TensorInfo, delta: Array) -> tuple[Stored, Parts]:
        """How a difference (n,) is stored, and its parts, which are taken from ``delta``."""
        code = NAMES[self._options.value_dtype]
        if len(info.shape) < 2 or info.count >= 1 << 32:
            whole = rounded(delta.astype(np.float64), code)
            delta -= whole
            return "whole", {"delta": whole.reshape(info.shape)}
        if self._options.form == "sign":
            scale = np.float32(np.abs(delta).mean(dtype=np.float64))
            bits = delta >= 0
            delta -= np.where(bits, scale, -scale)
            return "signs", {"sign": np.packbits(bits), "scale": np.array([scale])}
        density = float(self._options.density or 1)
        if self._options.prune == "random":
            kept = drawn_from(delta, density, key_of(self._options.seed, info.name, 0))
        else:
            kept = largest(delta, density)
        index = np.flatnonzero(kept)
        values = rounded(kept[index].astype(np.float64), code)
        delta[index] -= values
        return "entries", {"index": index.astype(np.uint32), "value": values}

    def publish(
        self, out: Path, found: list[Packed], threads: int | None, progress: Progress | None
    ) -> AdapterArtifact:
        """Everything in one file, with a description of it."""
        tensors = {name: operand for packed in found for name, operand in packed.tensors.items()}
        if not tensors:
            raise InputRejected(f"nothing to pack: {self._pair.model.label} is {self._pair.base.label}")
        shard = plan_file(ADAPTER, [TensorInfo(name, o.dtype, o.shape) for name, o in sorted(tensors.items())])
        reports, base = [packed.report for packed in found], self._pair.base
        name = public_name(base.label, base.is_local)
        content: dict[str, Any] = {"peft_type": PACK, "base_model_name_or_path": name, "inference_mode": True}
        files = {
            CONFIG: (json.dumps(content, indent=2) + "\n").encode(),
            "README.md": pack_card(out.name, name, self._options.form, reports).encode(),
        }
        done = publish(out, self._work, tensors, files, shards=[shard], threads=threads, progress=progress)
        return AdapterArtifact(**vars(done), modules=reports)

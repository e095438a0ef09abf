"""From a fine-tune and its base to the adapter that turns one into the other, as nearly as its rank allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import hypot
from pathlib import Path

import numpy as np

from ..checkpoint import ADAPTER, TensorInfo, plan_file
from ..engine.artefact import Source, Work, open_models, publish
from ..engine.card import public_name
from ..engine.execute import usable_cores
from ..engine.progress import Progress, Silent
from ..engine.publish import check_destination
from ..engine.spool import Spool
from ..errors import InputRejected
from ..kernels.dtypes import rounded
from ..kernels.program import Operand
from ..recipe import parse_size
from .lowrank import Array, Limits, factors, low_rank, residual
from .modules import Module
from .options import Form, Options
from .pair import Pair
from .peft import CONFIG, config, factor_names, key, short, task_of, tucker_config
from .pool import for_each
from .report import AdapterArtifact, ModuleReport, notices, readme
from .tucker import of_matrix, tucker


@dataclass
class Part:
    """One module's share of the adapter: its report, and its tensors by their names in the file."""

    module: Module
    report: ModuleReport
    tensors: dict[str, Operand] = field(default_factory=dict)


def extract_lora(
    base: Source, model: Source, out: str | Path, *, rank: int = 128, error: float | None = None,
    sv_epsilon: float = 0.0, distribute_scale: bool = True, embeddings: bool = False,
    save_modules: Sequence[str] = (), include: Sequence[str] = (), exclude: Sequence[str] = (),
    skip_undecomposable: bool = False, factor_dtype: str = "float32", form: Form = "lora",
    allow_pickle: bool = False, threads: int | None = None, memory: str | int = "4GiB",
    progress: Progress | None = None,
) -> AdapterArtifact:  # fmt: skip
    """Publish the PEFT adapter that leads from ``base`` to ``model`` as the new folder ``out``.

    Each matrix of the difference is replaced by its best approximation of low rank. What has no such form
    (norms) is stored whole if it differs, and so are embedding and head.

    Parameters
    ----------
    base, model: folders, files, hub ids, or dicts of arrays.
    rank: the most directions per matrix.
    error: of these, take as few as leave this relative error (0.1: a tenth of the norm of the difference).
    sv_epsilon: leave out singular values up to this.
    distribute_scale: both factors carry the square root of the singular values; else A carries them whole.
    embeddings: decompose embedding and head as well.
    save_modules: last parts of names ("down_proj") of modules to store whole.
    include, exclude: regular expressions searched for in the modules' names; what is left out stays as in
        the base, and ``exclude`` wins.
    skip_undecomposable: leave out what cannot be decomposed instead of storing it whole.
    factor_dtype: of the factors ("float32", "bfloat16", ...).
    form: "lora", or "flora" for Tucker adapters (Si et al., 2024): a convolution keeps its axes, each of which has
        at most ``rank`` directions of its own.
    allow_pickle: read pickled weights, too, where there are no others.
    threads, memory: as many matrices at once as there are threads, as far as the memory allows.

    Raises UsageError, InputRejected or OperationFailed; then ``out`` does not exist.
    """
    out = Path(out)
    options = Options(
        Limits(rank, error, sv_epsilon), distribute_scale, embeddings, tuple(save_modules), tuple(include),
        tuple(exclude), skip_undecomposable, factor_dtype, form,
    )  # fmt: skip
    opened = open_models(allow_pickle, base=base, model=model)
    work = Work("extract_lora", asdict(options), opened)
    try:
        check_destination(out, work.folders())
        with Spool(out.absolute().parent) as spool:
            extractor = _Extractor(work, options, spool)
            parts = extractor.run(threads or usable_cores(), parse_size(memory), progress or Silent())
            return extractor.publish(out, parts, threads, progress)
    finally:
        work.close()


class _Extractor:
    """Makes the part of every module, and an adapter of them."""

    def __init__(self, work: Work, options: Options, spool: Spool) -> None:
        self._work, self._options, self._spool = work, options, spool
        self._pair = Pair(work)

    def run(self, threads: int, memory: int, progress: Progress) -> list[Part]:
        """The parts of all modules, in the order of their names, many at once."""
        return for_each(
            self._pair.modules, self._part, needs=self._memory, nbytes=self._pair.nbytes,
            threads=threads, memory=memory, progress=progress, label="decomposing",
        )  # fmt: skip

    def _memory(self, module: Module) -> int:
        """Both tensors; the Gram matrix, its eigenvectors and their workspace; strips; the factors in fp64."""
        nbytes = 2 * self._pair.nbytes(module)
        if self._options.fate(module, self._pair.resized(module))[0] != "low rank":
            return nbytes + 1
        short, long = sorted(self._pair.shape(module))
        if self._options.form == "flora" and module.kind == "convolution":
            return nbytes + 8 * (4 * short * long + 4 * short * short)
        return nbytes + 8 * (4 * short * short + 3 * 2048 * short + 4 * min(self._options.limits.rank, short) * long)

    # --- one module -------------------------------------------------------------------------------------

    def _part(self, module: Module) -> Part:
        fate, why = self._options.fate(module, self._pair.resized(module))
        if fate == "low rank":
            return self._decomposed(module)
        norm = self._pair.norm(module)
        if fate == "nothing" or norm == 0:
            return _left_out(module, norm, why if norm else "equal")
        return self._whole(module, norm, why)

    def _whole(self, module: Module, norm: float, why: str) -> Part:
        tensors = {
            key(module.name, parameter): self._work.operand(self._pair.model, name)
            for parameter, name in module.tensors.items()
        }
        return Part(module, ModuleReport(module.name, "whole", 0, norm, 0.0, why=why), dict(tensors))

    def _decomposed(self, module: Module) -> Part:
        bias = self._pair.offset(module.tensors["bias"]) if "bias" in module.tensors else np.zeros(0)
        if self._options.form == "flora":
            return self._with_core(module, float(np.linalg.norm(bias)))
        difference, options = self._pair.difference(module), self._options
        found = low_rank(difference, options.limits)
        shift = float(np.linalg.norm(bias))
        norm = hypot(found.norm, shift)
        if not found.rank:
            return self._whole(module, norm, "its bias differs") if shift else _left_out(module, norm, _why(norm))
        swapped = module.transposed or module.kind == "embedding"
        b, a = factors(found.transposed if swapped else found, options.distribute_scale, options.dtype)
        names = factor_names(module.name, module.kind == "embedding")
        tensors: dict[str, Operand] = dict(zip(names, self._spooled(module, a, b), strict=True))
        if shift:
            tensors[key(module.name, "lora_B.bias")] = self._spool.put(rounded(bias, options.dtype))
        error = residual(difference, *((a.T, b.T) if swapped else (b, a)))
        above = int((found.spectrum > difference.rounding()).sum())
        return Part(module, ModuleReport(module.name, "low rank", found.rank, norm, error, above), tensors)

    def _with_core(self, module: Module, shift: float) -> Part:
        """A Tucker form, which has no place for biases."""
        array = self._pair.array(module)
        norm = float(np.linalg.norm(array))
        if shift:
            return self._whole(module, hypot(norm, shift), "its bias differs")
        limits = self._options.limits
        found = tucker(array, limits) if array.ndim > 2 else of_matrix(low_rank(self._pair.difference(module), limits))
        if not min(found.ranks):
            return _left_out(module, norm, _why(norm))
        stored = found.rounded(self._options.dtype)
        report = ModuleReport(
            module.name, "low rank", max(stored.ranks), norm, float(np.linalg.norm(array - stored.array()))
        )
        # FLoRA counts the inputs first.
        order = range(array.ndim) if module.transposed else (1, 0, *range(2, array.ndim))
        parts = {f"param_{place}": stored.factors[axis] for place, axis in enumerate(order)}
        parts["param_G"] = stored.core.transpose(*order)
        return Part(module, report, {key(module.name, name): self._spool.put(part) for name, part in parts.items()})

    def _spooled(self, module: Module, a: Array, b: Array) -> tuple[Operand, Operand]:
        """Both factors, in the shapes that PEFT gives them: those of a convolution are convolutions."""
        if module.kind == "convolution":
            _, *inner = self._pair.model.checkpoint.tensors[module.tensors["weight"]].shape
            a, b = a.reshape(-1, *inner), b.reshape(*b.shape, *(1 for _ in inner[1:]))
        return self._spool.put(a), self._spool.put(b)

    # --- the adapter ------------------------------------------------------------------------------------

    def publish(
        self, out: Path, parts: Sequence[Part], threads: int | None, progress: Progress | None
    ) -> AdapterArtifact:
        """Everything that has a part, in one file, with PEFT's description of it."""
        reports = [part.report for part in parts]
        tensors = {name: operand for part in parts for name, operand in part.tensors.items()}
        if not tensors:
            raise InputRejected(
                f"nothing to extract: {self._pair.model.label} is {self._pair.base.label}, as far as asked"
            )
        self._work.notices += notices(reports)
        shard = plan_file(ADAPTER, [TensorInfo(name, o.dtype, o.shape) for name, o in sorted(tensors.items())])
        files = {CONFIG: self._config(parts), "README.md": readme(out.name, self._base_name, reports).encode()}
        done = publish(out, self._work, tensors, files, shards=[shard], threads=threads, progress=progress)
        return AdapterArtifact(**vars(done), modules=reports)

    @property
    def _base_name(self) -> str:
        return public_name(self._pair.base.label, self._pair.base.is_local)

    def _config(self, parts: Sequence[Part]) -> bytes:
        ranks = {part.module.name: part.report.rank for part in parts if part.report.stored == "low rank"}
        whole = short([part.module.name for part in parts if part.report.stored == "whole"], self._pair.modules)
        architectures = self._pair.model.checkpoint.config.get("architectures") or [None]
        if self._options.form == "flora":
            return tucker_config(max(ranks.values(), default=1), whole=whole, base=self._base_name)
        modules, parameters = self._pair.modules, [name for part in parts for name in part.tensors]
        return config(
            ranks,
            targets=short(ranks, modules),
            whole=whole,
            base=self._base_name,
            bias=any(name.endswith("lora_B.bias") for name in parameters),
            task=task_of(architectures[0]),
            transposed=any(part.module.transposed for part in parts if part.report.rank),
        )


def _left_out(module: Module, norm: float, why: str) -> Part:
    return Part(module, ModuleReport(module.name, "nothing", 0, norm, norm, why=why))


def _why(norm: float) -> str:
    return "no direction is within the limits" if norm else "equal"

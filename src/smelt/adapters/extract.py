"""From a fine-tune and its base to the adapter that turns one into the other, as nearly as its rank allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from math import hypot, prod
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.artefact import Source, Work, open_models
from ..engine.card import public_name
from ..engine.progress import Progress
from ..kernels.dtypes import DTYPES, rounded
from ..kernels.program import Operand
from .lowrank import Array, Limits, factors, low_rank, residual
from .making import Maker, Means, Part
from .modules import Module
from .options import Form, Options
from .outlook import AdapterPlan, Outlook
from .pair import Pair
from .peft import CONFIG, config, factor_names, key, short, task_of, tucker_config
from .report import AdapterArtifact, ModuleReport, notices, readme
from .tucker import of_matrix, tucker


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
    with _extractor(base, model, out, options, allow_pickle) as extractor:
        return extractor.make(out, Means.of(threads, memory, progress))


def plan_extract_lora(
    base: Source, model: Source, out: str | Path, *, rank: int = 128, error: float | None = None,
    sv_epsilon: float = 0.0, allow_pickle: bool = False, threads: int | None = None, memory: str | int = "4GiB",
    **options: Any,
) -> AdapterPlan:  # fmt: skip
    """What :func:`extract_lora` would do with these options: everything is checked, and nothing written."""
    asked = Options(Limits(rank, error, sv_epsilon), **options)
    with _extractor(base, model, Path(out), asked, allow_pickle) as extractor:
        return extractor.plan(Means.of(threads, memory, None))


@contextmanager
def _extractor(
    base: Source, model: Source, out: Path, options: Options, allow_pickle: bool
) -> Iterator[_Extractor]:  # fmt: skip
    """With both models open, and a destination that will do."""
    work = Work("extract_lora", asdict(options), open_models(allow_pickle, base=base, model=model))
    with work.towards(out):
        yield _Extractor(work, options)


class _Extractor(Maker[Module]):
    """Makes the part of every module, and an adapter of them."""

    label = "decomposing"

    def __init__(self, work: Work, options: Options) -> None:
        super().__init__(work)
        self._options, self._pair = options, Pair(work)
        self.units = self._pair.modules

    def nbytes(self, unit: Module) -> int:
        return self._pair.nbytes(unit)

    def memory(self, unit: Module) -> int:
        """Both tensors; the Gram matrix, its eigenvectors and their workspace; strips; the factors in fp64."""
        nbytes = 2 * self._pair.nbytes(unit)
        if self._options.fate(unit, self._pair.resized(unit))[0] != "low rank":
            return nbytes + 1
        short, long = sorted(self._pair.shape(unit))
        if self._options.form == "flora" and unit.kind == "convolution":
            return nbytes + 8 * (4 * short * long + 4 * short * short)
        return nbytes + 8 * (4 * short * short + 3 * 2048 * short + 4 * min(self._options.limits.rank, short) * long)

    def reads(self, unit: Module) -> int:
        return self._pair.reads(unit.tensors.values())

    def outlook(self, unit: Module) -> Outlook:
        fate, why = self._options.fate(unit, self._pair.resized(unit))
        if fate == "nothing":
            return Outlook(unit.name, "nothing", why=why)
        if fate == "whole":
            return Outlook(unit.name, "whole", 0, self.nbytes(unit), why=why)
        rank, count = self._most(unit)
        size = count * DTYPES[self._options.dtype].bits // 8
        whole = self.nbytes(unit) if "bias" in unit.tensors else 0  # stored so where nothing else differs
        return Outlook(unit.name, "low rank", rank, max(size, whole), size)

    def _most(self, unit: Module) -> tuple[int, int]:
        """The largest rank that its factors can have, and how many values they then hold."""
        limit = self._options.limits.rank
        if self._options.form == "flora":
            shape = self._pair.model.checkpoint.tensors[unit.tensors["weight"]].shape
            ranks = [min(limit, length, prod(shape) // length) for length in shape]
            return max(ranks), prod(ranks) + sum(map(mul, ranks, shape))
        m, n = self._pair.shape(unit)
        rank = min(limit, m, n)
        return rank, rank * (m + n) + (m if "bias" in unit.tensors else 0)

    # --- one module -------------------------------------------------------------------------------------

    def part(self, unit: Module) -> Part:
        fate, why = self._options.fate(unit, self._pair.resized(unit))
        if fate == "low rank":
            return self._decomposed(unit)
        norm = self._pair.norm(unit)
        if fate == "nothing" or norm == 0:
            return _left_out(unit, norm, why if norm else "equal")
        return self._stored_whole(unit, norm, why)

    def _stored_whole(self, module: Module, norm: float, why: str) -> Part:
        tensors = {
            key(module.name, parameter): self.work.operand(self._pair.model, name)
            for parameter, name in module.tensors.items()
        }
        return Part(ModuleReport(module.name, "whole", 0, norm, 0.0, why=why), dict(tensors))

    def _decomposed(self, module: Module) -> Part:
        bias = self._pair.offset(module.tensors["bias"]) if "bias" in module.tensors else np.zeros(0)
        if self._options.form == "flora":
            return self._with_core(module, float(np.linalg.norm(bias)))
        difference, options = self._pair.difference(module), self._options
        found = low_rank(difference, options.limits)
        shift = float(np.linalg.norm(bias))
        norm = hypot(found.norm, shift)
        if not found.rank:
            return (
                self._stored_whole(module, norm, "its bias differs") if shift else _left_out(module, norm, _why(norm))
            )
        swapped = module.transposed or module.kind == "embedding"
        b, a = factors(found.transposed if swapped else found, options.distribute_scale, options.dtype)
        names = factor_names(module.name, module.kind == "embedding")
        tensors: dict[str, Operand] = dict(zip(names, self._spooled(module, a, b), strict=True))
        if shift:
            tensors[key(module.name, "lora_B.bias")] = self.keep(rounded(bias, options.dtype))
        error = residual(difference, *((a.T, b.T) if swapped else (b, a)))
        above = int((found.spectrum > difference.rounding()).sum())
        return Part(ModuleReport(module.name, "low rank", found.rank, norm, error, above), tensors)

    def _with_core(self, module: Module, shift: float) -> Part:
        """A Tucker form, which has no place for biases."""
        array = self._pair.array(module)
        norm = float(np.linalg.norm(array))
        if shift:
            return self._stored_whole(module, hypot(norm, shift), "its bias differs")
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
        return Part(report, {key(module.name, name): self.keep(part) for name, part in parts.items()})

    def _spooled(self, module: Module, a: Array, b: Array) -> tuple[Operand, Operand]:
        """Both factors, in the shapes that PEFT gives them: those of a convolution are convolutions."""
        if module.kind == "convolution":
            _, *inner = self._pair.model.checkpoint.tensors[module.tensors["weight"]].shape
            a, b = a.reshape(-1, *inner), b.reshape(*b.shape, *(1 for _ in inner[1:]))
        return self.keep(a), self.keep(b)

    # --- the adapter ------------------------------------------------------------------------------------

    def emptiness(self) -> str:
        return f"nothing to extract: {self._pair.model.label} is {self._pair.base.label}, as far as asked"

    def files(self, title: str, parts: Sequence[Part], tensors: Mapping[str, Operand]) -> Mapping[str, bytes]:
        """PEFT's description of it."""
        reports = [part.report for part in parts]
        self.work.notices += notices(reports)
        return {CONFIG: self._config(reports, tensors), "README.md": readme(title, self._base_name, reports).encode()}

    @property
    def _base_name(self) -> str:
        return public_name(self._pair.base.label, self._pair.base.is_local)

    def _config(self, reports: Sequence[ModuleReport], tensors: Mapping[str, Operand]) -> bytes:
        modules = self._pair.modules
        ranks = {report.module: report.rank for report in reports if report.stored == "low rank"}
        whole = short([report.module for report in reports if report.stored == "whole"], modules)
        architectures = self._pair.model.checkpoint.config.get("architectures") or [None]
        if self._options.form == "flora":
            return tucker_config(max(ranks.values(), default=1), whole=whole, base=self._base_name)
        return config(
            ranks,
            targets=short(ranks, modules),
            whole=whole,
            base=self._base_name,
            bias=any(name.endswith("lora_B.bias") for name in tensors),
            task=task_of(architectures[0]),
            transposed=any(module.transposed for module in modules if ranks.get(module.name)),
        )


def _left_out(module: Module, norm: float, why: str) -> Part:
    return Part(ModuleReport(module.name, "nothing", 0, norm, norm, why=why))


def _why(norm: float) -> str:
    return "no direction is within the limits" if norm else "equal"

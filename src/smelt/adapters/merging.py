"""Several adapters as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from math import hypot
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import TensorInfo, open_adapter
from ..checkpoint.adapter import Adapter
from ..engine.artefact import Work
from ..engine.card import hub_id, public_name
from ..engine.inputs import Input
from ..engine.progress import Progress
from ..engine.publish import check_destination
from ..errors import InputRejected, show
from ..kernels.dtypes import DTYPES, rounded
from ..kernels.program import Operand
from ..recipe import ModelReference, Position
from .combinations import too_large
from .factored import Term, core_of
from .lowrank import Array, Matrix
from .making import Maker, Means, Part
from .merge_options import MergeOptions
from .outlook import AdapterPlan, Outlook
from .peft import CONFIG, config, factor_names, key
from .pieces import Piece, pieces_of, saved_of, targets_of
from .report import AdapterArtifact, ModuleReport, merge_card
from .rules import Compatible, Exact, InCore, Result
from .values import finite_values


def merge_lora(
    adapters: Sequence[str | Path | Adapter], out: str | Path, *, weights: Sequence[float] | None = None,
    rank: int | None = None, error: float | None = None, combination_type: str | None = None,
    density: float | None = None, majority_sign_method: str | None = None, method: str | None = None,
    parameters: Mapping[str, Any] | None = None, seed: int = 0, factor_dtype: str = "float32",
    allow_pickle: bool = False, threads: int | None = None, memory: str | int = "4GiB",
    progress: Progress | None = None,
) -> AdapterArtifact:  # fmt: skip
    """Publish one PEFT adapter made of several as the new folder ``out``.

    By default the exact weighted sum of what the adapters change, of whatever ranks, alphas and modules, at the
    smallest rank that holds it; no matrix of a model's size is ever made, and no base model is needed.

    Parameters
    ----------
    adapters: folders, hub ids or URLs of LoRA adapters in PEFT's format, or opened ones, which are closed.
    weights: one for each; 1 by default, which is the plain sum.
    rank: the most directions per module; the nearest adapter of that rank.
    error: of these, take as few as leave this relative error (0.1: a tenth of the norm of the sum).
    combination_type: one of the types of PEFT's ``add_weighted_adapter`` ("linear", "ties", "dare_linear_svd", ...)
        with its numbers instead, where all but "cat" and "svd" are no sums of what the adapters change. ``rank`` is
        then PEFT's ``svd_rank``, and the result has it in every module.
    density, majority_sign_method: of that type.
    method, parameters: one of smelt's merge methods instead, in the space that the adapters share (core space): on
        matrices of the size of all ranks together. ``rank`` and ``error`` cut its result.
    seed: of random draws.
    factor_dtype: of the factors ("float32", "bfloat16", ...).
    allow_pickle: read pickled weights, too, where there are no others.
    threads, memory: as many modules at once as there are threads, as far as the memory allows.

    Raises UsageError, InputRejected or OperationFailed; then ``out`` does not exist.
    """
    out = Path(out)
    options = MergeOptions(
        tuple(map(float, weights)) if weights is not None else None, rank, error, combination_type, density,
        majority_sign_method, method, dict(parameters or {}), seed, factor_dtype,
    )  # fmt: skip
    with _merger(adapters, out, options, allow_pickle) as merger:
        return merger.make(out, Means.of(threads, memory, progress))


def plan_merge_lora(
    adapters: Sequence[str | Path | Adapter], out: str | Path, *, allow_pickle: bool = False,
    threads: int | None = None, memory: str | int = "4GiB", **options: Any,
) -> AdapterPlan:  # fmt: skip
    """What :func:`merge_lora` would do with these options: everything is checked, and nothing written."""
    with _merger(adapters, Path(out), MergeOptions(**options), allow_pickle) as merger:
        return merger.plan(Means.of(threads, memory, None))


@contextmanager
def _merger(
    adapters: Sequence[str | Path | Adapter], out: Path, options: MergeOptions, allow_pickle: bool
) -> Iterator[_Merger]:  # fmt: skip
    """With all adapters open, and a destination that will do."""
    options.check(len(adapters))
    opened: list[Adapter] = []
    try:
        opened += (open_adapter(adapter, allow_pickle=allow_pickle) for adapter in adapters)
        work = Work("merge_lora", asdict(options), [_input(adapter) for adapter in opened], options.seed)
        check_destination(out, work.folders())
        yield _Merger(work, opened, options)
    finally:
        for adapter in opened:
            adapter.file.close()


def _input(adapter: Adapter) -> Input:
    label = adapter.label
    return Input(ModelReference(label, label, Position(label)), adapter.file)


class _Merger(Maker[Piece]):
    """Makes the part of every module, and an adapter of them."""

    label = "merging"

    def __init__(self, work: Work, adapters: Sequence[Adapter], options: MergeOptions) -> None:
        super().__init__(work)
        self._adapters, self._options = adapters, options
        self.units = pieces_of(adapters)
        self._saved = saved_of(adapters)
        self._stabilised = options.combination_type is not None and adapters[0].config.flag("use_rslora")
        self._rule = options.rule(self.units, len(adapters), self._stabilised)
        self._weights = options.factors(len(adapters))
        InputRejected.gather(self._biases())
        self._notices()

    def _biases(self) -> list[str]:
        """Only sums know what to do with them."""
        owner = next((place for p in self.units for place, update in p.parts if update.bias is not None), None)
        if owner is None or isinstance(self._rule, Exact):
            return []
        return [
            f"{self._adapters[owner].label}: lora_bias is true, and only the exact sum merges biases: leave method and "
            "combination_type out"
        ]

    def _notices(self) -> None:
        bases = {adapter.config.base for adapter in self._adapters if adapter.config.base}
        if len(bases) > 1:
            named = ", ".join(map(show, sorted(bases)))
            self.work.notices.append(f"the adapters name different bases, {named}: are they copies of one model?")
        if self._stabilised:
            self.work.notices.append(
                "as in PEFT, the result keeps use_rslora and so is too large by the root of its rank: leave "
                "combination_type out for the exact sum"
            )

    # --- all modules --------------------------------------------------------------------------------------

    def prepare(self, means: Means) -> None:
        """A method sees the cores of all modules."""
        if isinstance(self._rule, InCore):
            cores = self.each(self._cores, "reading", means)
            named = {piece.name: found for piece, found in zip(self.units, cores, strict=True)}
            self._rule.learn(named, len(self._adapters))

    def nbytes(self, unit: Piece) -> int:
        return unit.nbytes

    def memory(self, unit: Piece) -> int:
        """At the peak, as measured: the factors as stored, in fp64 five and a half times, and squares of the ranks;
        whole matrices where PEFT makes them."""
        (m, n), total = unit.shape, sum(unit.ranks)
        needed = unit.nbytes + 44 * (m + n) * total + 64 * total * total
        if isinstance(self._rule, Compatible) and self._rule.combination.whole_matrices:
            short = min(m, n)
            needed += 4 * m * n * (2 * len(unit.parts) + 3) + 8 * (4 * short * short + 3 * 2048 * short)
        return needed

    def held(self) -> int:
        """The cores of all modules in every adapter, and what a method makes of them."""
        if not isinstance(self._rule, InCore):
            return 0
        return sum(8 * (2 * len(self._adapters) + 2) * sum(piece.ranks) ** 2 for piece in self.units)

    def reads(self, unit: Piece) -> int:
        return unit.nbytes

    def outlook(self, unit: Piece) -> Outlook:
        m, n = unit.shape
        if isinstance(self._rule, Compatible):
            rank = self._rule.rank
        else:
            rank = max(1, min(sum(unit.ranks), m, n, self._rule.limits.rank))
        count = rank * (m + n) + (m if any(update.bias for _, update in unit.parts) else 0)
        nbytes = count * DTYPES[self._options.dtype].bits // 8
        return Outlook(unit.name, "low rank", rank, nbytes, nbytes)

    # --- one module ---------------------------------------------------------------------------------------

    def _cores(self, piece: Piece) -> dict[int, Matrix]:
        places = (place for place, _ in piece.parts)
        return dict(zip(places, core_of(self._terms(piece)).terms, strict=True))

    def _terms(self, piece: Piece) -> list[Term]:
        return [
            Term(self._matrix(place, update.b), self._matrix(place, update.a), update.scaling, self._weights[place])
            for place, update in piece.parts
        ]

    def _matrix(self, place: int, info: TensorInfo) -> Array:
        """A factor; a kernel counts as columns."""
        values = finite_values(self.work, self.work.inputs[place], info.name)
        return values.reshape(len(values), -1)

    def part(self, unit: Piece) -> Part:
        places = [place for place, _ in unit.parts]
        with np.errstate(over="ignore", invalid="ignore"):  # told below
            result = self._rule.merge(unit.name, self._terms(unit), places, self._options.dtype)
        if not (np.isfinite(result.a).all() and np.isfinite(result.b).all()):
            raise too_large(unit.name, self._options.factor_dtype)
        bias = self._bias(unit)
        shift = float(np.linalg.norm(bias))
        norm = hypot(result.norm, shift)
        if not len(result.a) and not shift:
            return Part(ModuleReport(unit.name, "nothing", 0, 0.0, 0.0, why="the sum is zero"))
        tensors = self._stored(unit, result)
        if shift:
            tensors[key(unit.name, "lora_B.bias")] = self.keep(rounded(bias, self._options.dtype))
        return Part(ModuleReport(unit.name, "low rank", max(1, len(result.a)), norm, result.error), tensors)

    def _bias(self, piece: Piece) -> Matrix:
        """The sum of what the adapters add to the module's bias; empty where none does."""
        total = np.zeros(piece.shape[0] if any(update.bias for _, update in piece.parts) else 0)
        for place, update in piece.parts:
            if update.bias is not None:
                total += self._weights[place] * update.scaling * self._matrix(place, update.bias)[:, 0]
        return total

    def _stored(self, piece: Piece, result: Result) -> dict[str, Operand]:
        """Both factors in the shapes that PEFT gives them; one direction of zeros where only the bias moves."""
        missing = 0 if len(result.a) else 1
        a, b = np.pad(result.a, ((0, missing), (0, 0))), np.pad(result.b, ((0, 0), (0, missing)))
        inner = piece.first.a.shape[1:]
        shaped = a.reshape(-1, *inner), b.reshape(*b.shape, *(1 for _ in inner[1:]))
        names = factor_names(piece.name, piece.first.form == "embedding")
        return dict(zip(names, map(self.keep, shaped), strict=True))

    # --- the adapter --------------------------------------------------------------------------------------

    def emptiness(self) -> str:
        return "the weighted sum of the adapters is zero in every module: nothing to write"

    def files(self, title: str, parts: Sequence[Part], tensors: Mapping[str, Operand]) -> Mapping[str, bytes]:
        """PEFT's description of it."""
        reports = [part.report for part in parts]
        inputs = [public_name(item.label, item.is_local) for item in self.work.inputs]
        card = merge_card(title, inputs, self._weights, self._base, self._options.described, reports)
        return {CONFIG: self._config(reports, tensors), "README.md": card.encode()}

    def whole(self) -> Mapping[str, Operand]:
        """The tensors that all adapters store whole, which must be the same in all."""
        found: dict[str, Operand] = {}
        for name, saved in self._saved.items():
            values = [
                finite_values(self.work, item, update.value.name)
                for item, update in zip(self.work.inputs, saved, strict=True)
            ]
            if not all(np.array_equal(values[0], other) for other in values[1:]):
                raise InputRejected(
                    f"tensor {show(name)} is stored whole and differs between the adapters: it has no factors to add; "
                    "merge the adapters with their base instead (base+adapter)"
                )
            found[saved[0].value.name] = self.work.operand(self.work.inputs[0], saved[0].value.name)
        return found

    def copied(self) -> int:
        return sum(saved[0].value.nbytes for saved in self._saved.values())

    @property
    def _base(self) -> str | None:
        """What the first adapter that says so calls its base; of a path the last part."""
        base = next((adapter.config.base for adapter in self._adapters if adapter.config.base), None)
        return base if base is None else public_name(base, not hub_id(base))

    def _config(self, reports: Sequence[ModuleReport], tensors: Mapping[str, Operand]) -> bytes:
        ranks = {report.module: report.rank for report in reports if report.rank}
        tasks = {str(adapter.config.content.get("task_type") or "") for adapter in self._adapters}
        whole = {name for adapter in self._adapters for name in adapter.config.names("modules_to_save")}
        return config(
            ranks,
            targets=targets_of(self._adapters, ranks, self.units),
            whole=sorted(whole),
            base=self._base,
            bias=any(name.endswith("lora_B.bias") for name in tensors),
            task=(tasks.pop() or None) if len(tasks) == 1 else None,
            transposed=any(piece.first.transposed for piece in self.units),
            stabilised=self._stabilised,
            whole_biases=str(self._adapters[0].config.content.get("bias") or "none"),
        )

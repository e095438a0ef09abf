"""The front door: look at some models, and say what a merge of them would meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..checkpoint import AdapterGiven, Checkpoint, load, load_adapted, open_adapter
from ..engine.backbone import Likeness, judge, measure
from ..engine.facts import compare_configs
from ..engine.findings import Finding
from ..engine.progress import Progress, Silent
from ..engine.types import common_dtype
from ..engine.vocabulary import compare_vocabularies
from ..errors import InputRejected, UsageError
from ..kernels.dtypes import DTYPES, name_of
from .advise import Advice, advise, advise_average
from .bases import Candidate, candidates, judge_base, likely_base
from .inventory import common_tensors, compare_inventories
from .layers import by_layer, structure_of
from .result import Diagnosis, row_of
from .sampling import Sample
from .scale import judge_vectors
from .survey import Survey, survey

Source = str | Path | Mapping[str, Any] | Checkpoint

_ORDER = {"error": 0, "warning": 1, "note": 2}


def check(
    models: Sequence[Source],
    base: Source | None = None,
    *,
    sample: Sample = "auto",
    progress: Progress | None = None,
    allow_pickle: bool = False,
) -> Diagnosis:
    """Say whether ``models`` can be merged, what their task vectors are like, and which recipe to start with.

    Models are folders, files, hub ids, dicts of arrays or open checkpoints. Without ``base`` each model is
    tried as the base of the others. ``sample``: "auto" (small models whole, large ones by evenly spread
    runs), "full", or the share to read. ``allow_pickle``: as for :func:`smelt.load`. Raises UsageError for no
    models, InputRejected and OperationFailed as :func:`smelt.load` does; everything else is a finding.
    """
    if len(models) + (base is not None) < 2:
        raise UsageError("check compares models: give at least two, or one and --base")
    sources = [*(() if base is None else [("base", base)]), *((f"model {i}", m) for i, m in enumerate(models))]
    with ExitStack() as stack:
        opened = _opened(sources, base, stack, allow_pickle)
        given = None if base is None else opened.pop(0)
        return _check(opened, given, sample, progress or Silent())


def _opened(
    sources: Sequence[tuple[str, Source]], base: Source | None, stack: ExitStack, allow_pickle: bool
) -> list[Checkpoint]:
    """Paths and ids are called what the caller wrote, arrays in memory by their place. Adapters lie on ``base``.

    Raises InputRejected with the problems of all that cannot be opened.
    """
    opened: list[Checkpoint] = []
    problems: list[str] = []
    for name, source in sources:
        try:
            opened.append(_open_one(name, source, base, stack, allow_pickle))
        except InputRejected as error:
            problems += error.problems
    InputRejected.gather(dict.fromkeys(problems))
    return opened


def _open_one(name: str, source: Source, base: Source | None, stack: ExitStack, allow_pickle: bool) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    try:
        label = name if isinstance(source, Mapping) else None
        return stack.enter_context(load(source, label=label, allow_pickle=allow_pickle))
    except AdapterGiven:
        if base is None or base is source or isinstance(base, Checkpoint):
            raise
        adapter = [(open_adapter(str(source), allow_pickle=allow_pickle), 1.0)]
        return stack.enter_context(
            load_adapted(load(base, label="base", allow_pickle=allow_pickle), adapter, str(source))
        )


def _check(models: list[Checkpoint], base: Checkpoint | None, sample: Sample, progress: Progress) -> Diagnosis:
    everyone = [*([base] if base is not None else []), *models]
    likeness = measure(everyone)
    tried = _candidates(likeness, models, base)
    found = compare_inventories(models, base) + compare_configs(everyone) + compare_vocabularies(everyone)
    found += judge_base(tried, None if base is None else base.label)
    if base is None and (label := likely_base(tried)) is not None:
        base = next(model for model in models if model.label == label)
        models = [model for model in models if model is not base]
        likeness = measure([base, *models])
    found += judge(likeness, base is not None)
    surveyed = None if base is None else _survey(models, base, sample, progress)
    if surveyed is not None:
        strangers = {finding.models[0] for finding in found if finding.code == "different-backbone"}
        found += judge_vectors(surveyed, strangers)
    return Diagnosis(
        models=tuple(model.label for model in models),
        base=None if base is None else base.label,
        findings=tuple(sorted(found, key=lambda finding: _ORDER[finding.severity])),
        candidates=tuple(tried),
        advice=_advice(models, surveyed, found, _superfluous(likeness, base is not None)),
        **_tables(surveyed),
    )


def _candidates(likeness: Likeness, models: Sequence[Checkpoint], base: Checkpoint | None) -> list[Candidate]:
    """Everyone tried as the base; the models alone where the base given is a stranger to them."""
    if _alike(likeness, base is not None):
        return candidates(likeness)
    if base is None or len(models) < 2:
        return []
    alone = measure(models)
    return candidates(alone) if _alike(alone, False) else []


def _alike(likeness: Likeness, has_base: bool) -> bool:
    return bool(likeness.names) and all(f.severity != "error" for f in judge(likeness, has_base))


def _survey(models: Sequence[Checkpoint], base: Checkpoint, sample: Sample, progress: Progress) -> Survey:
    groups = by_layer(structure_of(base), common_tensors([base, *models]))
    return survey(models, base, groups, sample, progress)


def _tables(surveyed: Survey | None) -> dict[str, Any]:
    if surveyed is None or not surveyed.tensors:
        return {}
    return {
        "overall": row_of("all", surveyed.total, surveyed),
        "layers": tuple(row_of(layer, vectors, surveyed) for layer, vectors in surveyed.layers.items()),
        "tensors": surveyed.tensors,
        "share_read": surveyed.share_read,
    }


def _superfluous(likeness: Likeness, has_base: bool) -> set[int]:
    """Positions of models that equal the base or an earlier model."""
    first = int(has_base)
    if not likeness.names:
        return set()
    return {j - first for j in range(first, len(likeness.labels)) if likeness.equal[:j, j].any()}


def _advice(
    models: Sequence[Checkpoint], surveyed: Survey | None, found: Sequence[Finding], skipped: set[int]
) -> Advice | None:
    if any(finding.severity == "error" for finding in found):
        return None
    dtype = name_of(common_dtype(_floating(models)))
    if surveyed is not None:
        return advise(surveyed, skipped, dtype)
    return advise_average([model.label for index, model in enumerate(models) if index not in skipped], dtype)


def _floating(models: Sequence[Checkpoint]) -> list[str]:
    codes = [info.native for model in models for info in model.tensors.values() if DTYPES[info.dtype].arithmetic]
    return codes or ["F32"]

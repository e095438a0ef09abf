"""Do the models hold the same tensors, of the same shapes and kinds of number?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from ..architecture import role_of
from ..checkpoint import Checkpoint
from ..engine.backbone import comparable
from ..engine.findings import Finding
from ..errors import show
from ..kernels.dtypes import DTYPES

_EXAMPLES = 3


def common_tensors(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Names of the tensors that can be compared element by element, sorted."""
    names = set(checkpoints[0]).intersection(*checkpoints)
    return sorted(name for name in names if comparable([c.tensors[name] for c in checkpoints]))


def compare_inventories(models: Sequence[Checkpoint], base: Checkpoint | None) -> list[Finding]:
    """Errors for what a merge refuses: tensors missing or extra, shapes or kinds of number that differ."""
    everyone = [*([base] if base is not None else []), *models]
    wanted = set(base) if base is not None else _of_most(models)
    return [
        *(finding for checkpoint in everyone for finding in _presence(checkpoint, wanted)),
        *_shapes(everyone, wanted),
        *_dtypes(everyone, wanted),
    ]


def _of_most(models: Sequence[Checkpoint]) -> set[str]:
    """Without a base, the tensors of more than half of the models are the standard; of two, all of both."""
    counts: dict[str, int] = defaultdict(int)
    for name in (name for model in models for name in model):
        counts[name] += 1
    return {name for name, count in counts.items() if 2 * count > len(models) or len(models) == 2}


def _presence(checkpoint: Checkpoint, wanted: set[str]) -> list[Finding]:
    missing, extra = sorted(wanted - set(checkpoint)), sorted(set(checkpoint) - wanted)
    found = []
    if missing:
        text = f"{show(checkpoint.label)} lacks {_listed(missing)} that the others have"
        found.append(_error("missing-tensors", [checkpoint.label], text, missing))
    if extra:
        text = f"{show(checkpoint.label)} has {_listed(extra)} that the others lack: --on-extra copy or drop"
        found.append(_error("extra-tensors", [checkpoint.label], text, extra))
    return found


def _shapes(everyone: Sequence[Checkpoint], wanted: Iterable[str]) -> list[Finding]:
    """Differing shapes, gathered by which models have which: one finding for a whole vocabulary or width."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in sorted(wanted):
        shapes = {c.label: c.tensors[name].shape for c in everyone if name in c}
        if len(set(shapes.values())) > 1:
            groups[tuple(f"{show(label)}: {list(shape)}" for label, shape in shapes.items())].append(name)
    labels = [checkpoint.label for checkpoint in everyone]
    found = []
    for differing, names in groups.items():
        tokens = {role_of(name) for name in names} <= {"embedding", "head"}
        what = "vocabularies differ: " if tokens else ""
        text = f"{what}{_listed(names)} differ in shape: {', '.join(differing)}"
        found.append(_error("vocabulary-rows-differ" if tokens else "shapes-differ", labels, text, names))
    return found


def _dtypes(everyone: Sequence[Checkpoint], wanted: Iterable[str]) -> list[Finding]:
    """Integers against floats cannot be merged; floats of different width can."""
    kinds: dict[bool, dict[tuple[str, ...], list[str]]] = {True: defaultdict(list), False: defaultdict(list)}
    for name in sorted(wanted):
        codes = {c.label: c.tensors[name].native for c in everyone if name in c}
        if len(set(codes.values())) > 1:
            floating = all(DTYPES[code].floating for code in codes.values())
            kinds[floating][tuple(f"{show(label)}: {code}" for label, code in codes.items())].append(name)
    labels = tuple(checkpoint.label for checkpoint in everyone)
    errors = [
        _error("dtype-kinds-differ", labels, f"{_listed(names)} differ in kind: {', '.join(codes)}", names)
        for codes, names in kinds[False].items()
    ]
    return errors + [
        Finding("note", "dtypes-differ", labels, f"{_listed(names)} differ in precision: {', '.join(codes)}",
                {"tensors": names})
        for codes, names in kinds[True].items()
    ]  # fmt: skip


def _error(code: str, labels: Iterable[str], text: str, names: list[str]) -> Finding:
    return Finding("error", code, tuple(labels), text, {"tensors": names})


def _listed(names: Sequence[str]) -> str:
    """``3 tensors ('a', 'b', ...)``."""
    shown = ", ".join(show(name) for name in names[:_EXAMPLES])
    more = ", ..." if len(names) > _EXAMPLES else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{more})"

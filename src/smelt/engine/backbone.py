"""Do these models share a backbone? The answer from a small sample of their weights.

Fine-tunes of one base differ from it by a few per cent; two networks that were trained apart do not
correlate at all, even where every shape agrees. Averaging such networks gives a broken one, which nothing
but the weights can tell beforehand.

Sampled are at most 48 matrices: of each kind (tensors whose names differ in their numbers only, such as
all ``q_proj`` weights) the first, the middle and the last in depth, biggest kinds first. Of each matrix 16
runs of 256 consecutive elements are read, spread evenly. What is concluded comes from the products of the
models' samples with each other, in fp64. Vectors (norms, biases) are sampled in the same way, but only to
tell whether two models are equal: norms are much alike in any two networks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint import Checkpoint, TensorInfo
from ..errors import show
from ..kernels.dtypes import DTYPES
from .facts import compare_configs
from .findings import Finding
from .vocabulary import compare_vocabularies

#: Below this cosine, or above this norm(delta)/norm(base), a model did not grow from the base.
LEAST_COSINE = 0.95
LARGEST_RATIO = 0.3
#: Below this cosine two models have no base in common. Two deltas of 0.3 norms each, at right angles to the
#: base and to each other, leave 0.917; networks that were trained apart have about 0.
LEAST_SIBLING_COSINE = 0.9

_MOST_TENSORS, _PER_KIND = 48, 3
_RUNS, _RUN = 16, 256

Products = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Likeness:
    """How alike checkpoints are, by index, from samples of the same elements of each.

    ``names``: the matrices. ``products`` (matrices, k, k): dot products of the samples. ``equal`` (k, k): all
    sampled values agree, those of vectors too. ``elements``: how many were sampled of each checkpoint.
    """

    labels: tuple[str, ...]
    names: tuple[str, ...]
    products: Products
    equal: npt.NDArray[np.bool_]
    elements: int

    def cosine(self, a: int, b: int) -> float:
        """Median over the matrices of the cosine between ``a`` and ``b``; NaN without a matrix."""
        norms = np.sqrt(self.products[:, a, a] * self.products[:, b, b])
        return _median(self.products[:, a, b], norms)

    def ratio(self, model: int, base: int) -> float:
        """Median over the matrices of norm(model - base) / norm(base); NaN without a matrix."""
        return _median(np.sqrt(self._delta_squares(model, base)), np.sqrt(self.products[:, base, base]))

    def delta_cosine(self, a: int, b: int, base: int) -> float:
        """Median over the matrices of the cosine between the task vectors of ``a`` and ``b``."""
        p = self.products
        product = p[:, a, b] - p[:, a, base] - p[:, base, b] + p[:, base, base]
        return _median(product, np.sqrt(self._delta_squares(a, base) * self._delta_squares(b, base)))

    def grew_from(self, model: int, base: int) -> bool:
        """Whether ``model`` may be a fine-tune of ``base``, as far as the sample tells."""
        return not (self.cosine(model, base) < LEAST_COSINE or self.ratio(model, base) > LARGEST_RATIO)

    def siblings(self, a: int, b: int) -> bool:
        """Whether both may be fine-tunes of one base, as far as the sample tells."""
        return not self.cosine(a, b) < LEAST_SIBLING_COSINE

    def _delta_squares(self, model: int, base: int) -> Products:
        p = self.products
        squares = p[:, model, model] + p[:, base, base] - 2 * p[:, model, base]
        return np.maximum(squares, 0.0)


def _median(parts: Products, wholes: Products) -> float:
    usable = wholes > 0
    return float(np.median(parts[usable] / wholes[usable])) if usable.any() else float("nan")


def compare_backbones(
    models: Sequence[Checkpoint], base: Checkpoint | None, aligned: Container[str] = frozenset()
) -> list[Finding]:
    """Whether ``models`` can be merged (on ``base``) as far as sampled weights, configs and tokenizers tell.

    ``aligned``: tensors whose rows are matched by token, and not by position as they lie here; where there are
    some, tokenizers may differ.

    Errors: ``different-backbone`` and those of :func:`compare_configs` and :func:`compare_vocabularies`.
    Warnings: ``zero-delta`` (a model equals the base), ``duplicate`` (two models are equal). Note:
    ``no-backbone-evidence`` when no matrix has the same shape everywhere. Raises OperationFailed when a file
    cannot be read.
    """
    everyone = [*([base] if base is not None else []), *models]
    if len(everyone) < 2:
        return []
    weights = judge(measure(everyone, aligned), base is not None)
    return [*weights, *compare_configs(everyone), *(() if aligned else compare_vocabularies(everyone))]


def judge(likeness: Likeness, has_base: bool) -> list[Finding]:
    """What the weights say; with ``has_base`` index 0 is the base."""
    labels = likeness.labels
    if not likeness.names:
        text = "no weight matrix has one name and shape in all models: they may or may not share a backbone"
        return [Finding("note", "no-backbone-evidence", labels, text)]
    strangers = _against_base(likeness) if has_base else _among_models(likeness)
    return [*strangers, *_equal_models(likeness, has_base)]


def _against_base(likeness: Likeness) -> list[Finding]:
    strange = [i for i in range(1, len(likeness.labels)) if not likeness.grew_from(i, 0)]
    return [_stranger(likeness, i, 0, f"the base {show(likeness.labels[0])}", LEAST_COSINE) for i in strange]


def _among_models(likeness: Likeness) -> list[Finding]:
    """The largest group of models that share a backbone sets the standard; the others are reported."""
    labels, everyone = likeness.labels, range(len(likeness.labels))
    groups = [[j for j in everyone if likeness.siblings(i, j)] for i in everyone]
    largest = max(groups, key=len)
    first, strange = largest[0], [i for i in everyone if i not in largest]
    return [_stranger(likeness, i, first, show(labels[first]), LEAST_SIBLING_COSINE) for i in strange]


def _stranger(likeness: Likeness, model: int, other: int, who: str, least: float) -> Finding:
    labels = likeness.labels
    cosine, ratio = likeness.cosine(model, other), likeness.ratio(model, other)
    text = (
        f"{show(labels[model])} does not share the backbone of {who}: cosine {cosine:.3f} (fine-tunes have "
        f"at least {least}), norm of the difference {ratio:.2f} of the norm (at most {LARGEST_RATIO}); "
        f"merged they give a broken model: take fine-tunes of one base"
    )
    facts = {"cosine": round(cosine, 6), "delta_ratio": round(ratio, 6), **_evidence(likeness)}
    return Finding("error", "different-backbone", (labels[model], labels[other]), text, facts)


def _equal_models(likeness: Likeness, has_base: bool) -> list[Finding]:
    labels, found = likeness.labels, []
    for i in range(len(labels)):
        for j in range(i + 1, len(labels)):
            if likeness.equal[i, j]:
                found.append(_same(likeness, labels[i], labels[j], has_base and i == 0))
    return found


def _same(likeness: Likeness, first: str, second: str, with_base: bool) -> Finding:
    facts = _evidence(likeness)
    seen = f"all {facts['elements']} weights sampled are equal"
    if with_base:
        text = f"{show(second)} has no task vector: it equals the base {show(first)} ({seen})"
        return Finding("warning", "zero-delta", (second, first), text, facts)
    text = f"{show(first)} and {show(second)} are the same model: it counts twice ({seen})"
    return Finding("warning", "duplicate", (first, second), text, facts)


def _evidence(likeness: Likeness) -> dict[str, int]:
    return {"matrices": len(likeness.names), "elements": likeness.elements}


# --- the sample -----------------------------------------------------------------------------------------


def measure(checkpoints: Sequence[Checkpoint], without: Container[str] = frozenset()) -> Likeness:
    """Sample the same elements of all ``checkpoints`` and multiply the samples with each other."""
    matrices, vectors = (
        [name for name in sampled_tensors(checkpoints, kind) if name not in without]
        for kind in (_is_matrix, _is_vector)
    )
    names = [*matrices, *vectors]
    with ThreadPoolExecutor(len(checkpoints), thread_name_prefix="smelt-sample") as pool:
        samples = list(pool.map(lambda checkpoint: _samples(checkpoint, names), checkpoints))
    size = len(checkpoints)
    products, equal = np.zeros((len(matrices), size, size)), np.ones((size, size), np.bool_)
    for index, rows in enumerate(map(np.stack, zip(*samples, strict=True))):
        equal &= (rows[:, None] == rows[None, :]).all(axis=2)
        if index < len(matrices):
            products[index] = rows @ rows.T
    labels = tuple(checkpoint.label for checkpoint in checkpoints)
    return Likeness(labels, tuple(matrices), products, equal, sum(map(len, samples[0])))


def sampled_tensors(checkpoints: Sequence[Checkpoint], wanted: Callable[[tuple[int, ...]], bool]) -> list[str]:
    """Names of the tensors of the ``wanted`` shapes to look at, in the disk order of the first checkpoint."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in sorted(set(checkpoints[0]).intersection(*checkpoints), key=_natural):
        infos = [checkpoint.tensors[name] for checkpoint in checkpoints]
        if wanted(infos[0].shape) and comparable(infos):
            kinds[re.sub(r"[0-9]+", "#", name)].append(name)
    tensors = checkpoints[0].tensors
    ordered = sorted(kinds.values(), key=lambda names: -max(tensors[name].count for name in names))
    chosen = [name for names in ordered for name in _first_middle_last(names)][:_MOST_TENSORS]
    return sorted(chosen, key=lambda name: (tensors[name].file, tensors[name].offset, name))


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and prod(shape) > 1


def _is_vector(shape: tuple[int, ...]) -> bool:
    return len(shape) == 1


def comparable(infos: Sequence[TensorInfo]) -> bool:
    """Of one shape everywhere, and of types that have a value."""
    return len({info.shape for info in infos}) == 1 and all(DTYPES[info.dtype].arithmetic for info in infos)


def _first_middle_last(names: list[str]) -> list[str]:
    count = min(_PER_KIND, len(names))
    return [names[round(i * (len(names) - 1) / max(1, count - 1))] for i in range(count)]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key which puts layer 10 after layer 9."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)]


def _samples(checkpoint: Checkpoint, names: Sequence[str]) -> list[npt.NDArray[np.float64]]:
    """Sampled values per tensor. What is no number counts as 0: it is for others to report."""
    floats = (as_floats(_sample(checkpoint, name), checkpoint.tensors[name].dtype) for name in names)
    return [np.nan_to_num(values.astype(np.float64), nan=0, posinf=0, neginf=0) for values in floats]


def _sample(checkpoint: Checkpoint, name: str) -> npt.NDArray[Any]:
    """The sampled elements of one tensor, as stored: all of a small one, else evenly spread runs."""
    info = checkpoint.tensors[name]
    if info.count <= _RUNS * _RUN:
        runs, length, last = 1, info.count, 0
    else:
        runs, length, last = _RUNS, _RUN, info.count - _RUN
    out = np.empty((runs, length), DTYPES[info.dtype].storage)
    for index, run in enumerate(out):
        checkpoint.read(name, index * last // max(1, runs - 1), run)
    return out.reshape(-1)


def as_floats(stored: npt.NDArray[Any], code: str) -> npt.NDArray[Any]:
    """Stored elements as numbers: float64 of F64, float32 of any shorter type; exact."""
    if code == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    values = DTYPES[code].as_values(stored)
    return values if code in ("F64", "F32") else values.astype(np.float32)

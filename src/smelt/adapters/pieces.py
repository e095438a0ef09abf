"""Adapters side by side: which modules they change, and whether their changes can be added up."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from ..checkpoint.adapter import Adapter, LowRank, Saved, Update
from ..errors import InputRejected, show

_ADVICE = "merge each with its base first (base+adapter), then extract an adapter from the result"


@dataclass(frozen=True)
class Piece:
    """One module, and its factors in those adapters that have it: (place among the adapters, factors)."""

    name: str
    parts: tuple[tuple[int, LowRank], ...]

    @property
    def first(self) -> LowRank:
        return self.parts[0][1]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of B A; a kernel counts as columns."""
        return shape_of(self.first)

    @property
    def ranks(self) -> list[int]:
        return [update.rank for _, update in self.parts]

    @property
    def nbytes(self) -> int:
        return sum(update.a.nbytes + update.b.nbytes for _, update in self.parts)


def shape_of(update: LowRank) -> tuple[int, int]:
    return update.b.shape[0], prod(update.a.shape[1:])


def pieces_of(adapters: Sequence[Adapter]) -> list[Piece]:
    """All modules with factors, sorted by name. InputRejected with all that keeps the adapters from being added."""
    InputRejected.gather(problem for adapter in adapters for problem in _not_sums(adapter))
    parts: dict[str, list[tuple[int, LowRank]]] = defaultdict(list)
    for place, adapter in enumerate(adapters):
        for update in adapter.updates:
            if isinstance(update, LowRank):
                parts[update.module].append((place, update))
    pieces = [Piece(name, tuple(parts[name])) for name in sorted(parts)]
    InputRejected.gather(problem for piece in pieces for problem in _disagreements(piece, adapters))
    if not pieces:
        raise InputRejected(f"{adapters[0].label} holds no low-rank factors: nothing to merge")
    return pieces


def saved_of(adapters: Sequence[Adapter]) -> dict[str, list[Saved]]:
    """The tensors that were stored whole, by the base's names, of each adapter. InputRejected where one lacks any."""
    found: dict[str, list[Saved]] = defaultdict(list)
    for adapter in adapters:
        for update in adapter.updates:
            if isinstance(update, Saved):
                found[update.target].append(update)
    InputRejected.gather(
        f"tensor {show(name)} is stored whole in {len(saved)} of {len(adapters)} adapters: it has no factors to add; "
        "merge the adapters with their base instead (base+adapter)"
        for name, saved in sorted(found.items())
        if len(saved) != len(adapters)
    )
    return dict(sorted(found.items()))


def targets_of(adapters: Sequence[Adapter], kept: Collection[str], pieces: Sequence[Piece]) -> list[str]:
    """The names by which PEFT finds the modules that are kept.

    All of the adapters' own names together, where these are plain lists and every module is kept; else whole names.
    """
    contents = [adapter.config.content for adapter in adapters]
    narrowed = ("exclude_modules", "layers_to_transform", "layers_pattern")
    plain = all(isinstance(content.get("target_modules"), list) for content in contents)
    if not plain or any(content.get(key) for content in contents for key in narrowed) or len(kept) < len(pieces):
        return sorted(kept)
    return sorted({name for adapter in adapters for name in adapter.config.names("target_modules")})


def _not_sums(adapter: Adapter) -> Iterator[str]:
    """One line for each kind of change that is no plain low-rank product."""
    reasons = [(update.module, reason) for update in adapter.updates if (reason := _reason(update))]
    counts = Counter(reason for _, reason in reasons)
    for reason, count in counts.items():
        module = next(module for module, said in reasons if said == reason)
        more = f" and {count - 1} more" if count > 1 else ""
        yield f"{adapter.label}: {show(module)}{more}: {reason}: {_ADVICE}"


def _reason(update: Update) -> str | None:
    """Why a change cannot be added to others as factors."""
    if isinstance(update, Saved):
        return None
    if not isinstance(update, LowRank):
        return f"{_KINDS.get(type(update).__name__, 'a change')}, not a low-rank product"
    if update.magnitude is not None:
        return "DoRA, whose result also depends on the base's norms"
    if update.form == "experts" or update.parameter != "weight":
        return "factors of stacked experts, which adapters of whole experts cannot be told apart in"
    if update.b.shape[1] != update.a.shape[0]:
        return "factors of a grouped convolution"
    return None


_KINDS = {
    "Hadamard": "LoHa", "Kronecker": "LoKr", "Scaled": "(IA)^3", "Rows": "trained tokens", "Tucker": "FLoRA",
    "Shards": "MoS", "Entries": "a delta pack", "Signs": "a delta pack", "Dense": "a delta pack",
}  # fmt: skip


def _disagreements(piece: Piece, adapters: Sequence[Adapter]) -> Iterator[str]:
    """Where the adapters cannot belong to one base."""
    (place, first), *others = piece.parts
    for other, update in others:
        a, b = adapters[place].label, adapters[other].label
        if (update.form, shape_of(update)) != (first.form, shape_of(first)) or update.a.shape[1:] != first.a.shape[1:]:
            shapes = [f"{update.form} {list(shape_of(update))}" for update in (first, update)]
            yield f"{show(piece.name)} is {shapes[0]} in {a} and {shapes[1]} in {b}: they have different bases"
        elif update.transposed != first.transposed:
            yield f"{show(piece.name)}: fan_in_fan_out differs between {a} and {b}: correct the wrong config"

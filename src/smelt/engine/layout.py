"""Which tensors the output has, and from which tensors of which models each is made.

The tensors are those that the files hold; every one of them is accounted for. Architecture knowledge only
classifies: which layer, before or after the layers, embedding or head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..architecture import Structure, aligned
from ..errors import InputRejected, UsageError, show
from ..recipe import InputModel, ModelReference, OutputSlice, Recipe
from .inputs import Input, Inputs

OnExtra = Literal["error", "copy", "drop"]


@dataclass(frozen=True, eq=False)
class Source:
    """One model's tensor that goes into an output tensor; ``entry`` is the model's place in the recipe."""

    input: Input
    name: str
    entry: InputModel | None


@dataclass(frozen=True, eq=False)
class Piece:
    """One output tensor: its sources, its position t in [0, 1] on gradients, and what becomes of it.

    ``action`` is "merge", or "copy" where one source stands for all (``why`` says so).
    """

    name: str
    sources: tuple[Source, ...]
    t: float
    part: OutputSlice | None
    base: ModelReference | None
    action: Literal["merge", "copy"] = "merge"
    why: str = ""


@dataclass(frozen=True, eq=False)
class Layout:
    """All output tensors in natural order, the new number of layers (None: as the donor), and notices."""

    pieces: tuple[Piece, ...]
    layers: int | None
    layer_map: tuple[int, ...]
    notices: tuple[str, ...]


def layout(recipe: Recipe, inputs: Inputs, base_role: str, on_extra: OnExtra) -> Layout:
    """The layout of a ``models:`` or ``slices:`` recipe. InputRejected with everything that does not fit."""
    builder = _Builder(recipe, inputs, base_role, on_extra)
    return builder.from_models() if recipe.models is not None else builder.from_slices()


def natural_key(name: str) -> list[Any]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


#: A stored head may be missing where it is tied, and must not keep names from being matched.
_HEAD = "lm_head.weight"

_Member = tuple[Input, InputModel | None]

#: One model's contribution to a stretch of the output: output name -> source name.
_Names = Callable[[Input], Mapping[str, str]]


class _Builder:
    def __init__(self, recipe: Recipe, inputs: Inputs, base_role: str, on_extra: OnExtra) -> None:
        self._recipe = recipe
        self._inputs = inputs
        self._base_role = base_role
        self._on_extra = on_extra
        self._problems: list[str] = []
        self._notices: list[str] = []

    # --- models: the whole of each ----------------------------------------------------------------------

    def from_models(self) -> Layout:
        members: list[_Member] = [(self._inputs[entry.model], entry) for entry in self._recipe.models or ()]
        base = self._recipe.base_model
        if base is not None and all(item.label != base.text for item, _ in members):
            members.append((self._inputs[base], None))
        self._same_depth([item for item, _ in members])
        donor = self._inputs.donor
        position = _positions(donor.structure)
        pieces = self._pieces(members, lambda item: self._names_like(donor, item), None, base, position)
        InputRejected.gather(dict.fromkeys(self._problems))
        return Layout(_in_order(pieces), None, (), tuple(self._notices))

    def _names_like(self, donor: Input, item: Input) -> dict[str, str]:
        """All names of a model, by the donor's names where the two differ by a leading part only."""
        names = item.checkpoint.tensors
        theirs = aligned(names.keys() - {_HEAD}, donor.checkpoint.tensors.keys()) if item is not donor else None
        if theirs is None or all(own == other for own, other in theirs.items()):
            return {name: name for name in names}
        self._notices.append(
            f"{item.label}: tensors are called otherwise than in {donor.label}, matched by their names' ends"
        )
        return {theirs.get(name, name): name for name in names}

    def _same_depth(self, members: Sequence[Input]) -> None:
        depths = {item.label: {s.prefix: s.count for s in item.structure.stacks} for item in members}
        first_label, first = next(iter(depths.items()))
        for label, stacks in depths.items():
            for prefix in sorted(first.keys() & stacks.keys()):
                if first[prefix] != stacks[prefix]:
                    self._problems.append(
                        f"{label} has {stacks[prefix]} layers in {prefix}, {first_label} has {first[prefix]}: "
                        "models of different depth are combined by slices"
                    )
        InputRejected.gather(self._problems)

    # --- slices: layer ranges, stacked ------------------------------------------------------------------

    def from_slices(self) -> Layout:
        slices = self._recipe.slices or ()
        pieces = list(self._outside(slices[0], "pre"))
        layer_map: list[int] = []
        for part in slices:
            members = self._members(part)
            start = [_range_of(entry)[0] for _, entry in members]
            length = _range_of(members[0][1])[1] - start[0]
            for offset in range(length):
                names = _layer_names([s + offset for s in start], len(layer_map), [item for item, _ in members])
                t = offset / (length - 1) if length > 1 else 1.0
                pieces += self._pieces(members, names, part, self._base_of(part), _constant(t))
                layer_map.append(start[0] + offset)
        pieces += self._outside(slices[-1], "post")
        self._check_config(layer_map)
        InputRejected.gather(dict.fromkeys(self._problems))
        return Layout(_in_order(pieces), len(layer_map), tuple(layer_map), tuple(self._notices))

    def _check_config(self, layer_map: Sequence[int]) -> None:
        """A new depth must be stated in the config; what speaks of layers by pattern cannot be rewritten."""
        donor = self._inputs.donor
        structure, stack = donor.structure, donor.structure.main_stack
        if stack is None or not donor.checkpoint.config or list(layer_map) == list(range(stack.count)):
            return
        if not stack.count_keys:
            self._problems.append(
                f"{donor.label}: config.json does not tell which key counts the layers of {stack.prefix}"
            )
        for path, value in structure.layer_patterns.items():
            self._notices.append(f"config.json: {'.'.join(path)}: {value} speaks of layers as they were; check it")

    def _members(self, part: OutputSlice) -> list[tuple[Input, InputModel]]:
        members = [(self._inputs[source.model], source) for source in part.sources]
        for item, entry in members:
            first, last = _range_of(entry)
            stack = item.structure.main_stack
            if stack is None:
                raise InputRejected(
                    f"{item.label}: no single stack of layers to slice, found {len(item.structure.stacks)}"
                )
            if last > stack.count:
                raise UsageError(f"{item.label} has {stack.count} layers, the range asks for [{first}, {last}]")
        base = self._base_of(part)
        if base is not None and self._base_role == "required" and all(e.model.text != base.text for _, e in members):
            raise UsageError(
                f"base model {base.text} must be among the sources of each slice, with its own layer_range"
            )
        return members

    def _base_of(self, part: OutputSlice) -> ModelReference | None:
        return part.base_model or self._recipe.base_model

    def _outside(self, part: OutputSlice, kind: str) -> Iterator[Piece]:
        """Tensors before (with loose ones) or after the layers, from the sources of one slice."""
        kinds = {"pre": {"pre", "loose"}, "post": {"post"}}[kind]
        members = self._members(part)

        def names(item: Input) -> dict[str, str]:
            return {role.name: role.name for role in item.structure if role.kind in kinds}

        yield from self._pieces(members, names, part, self._base_of(part), _constant(0.0))

    # --- one stretch of the output ----------------------------------------------------------------------

    def _pieces(
        self, members: Sequence[_Member], names: _Names, part: OutputSlice | None,
        base: ModelReference | None, position: Callable[[str], float],
    ) -> list[Piece]:  # fmt: skip
        """One piece per name that any member has."""
        maps = [names(item) for item, _ in members]
        pieces = []
        for name in sorted(set().union(*maps)):
            sources = [
                Source(item, found, entry)
                for (item, entry), mapping in zip(members, maps, strict=True)
                if (found := mapping.get(name) or _lender(item, name)) is not None
            ]
            piece = Piece(name, tuple(sources), position(name), part, base)
            if len(sources) < len(members):
                missing = [item.label for (item, _), m in zip(members, maps, strict=True) if name not in m]
                if not self._extra(name, sources, missing):
                    continue
                piece = Piece(name, (sources[0],), 0.0, part, base, "copy", f"missing in {', '.join(missing)}")
            pieces.append(piece)
        return pieces

    def _extra(self, name: str, sources: Sequence[Source], missing: Sequence[str]) -> bool:
        """What becomes of a tensor that only some models have: True to copy it."""
        owners = ", ".join(source.input.label for source in sources)
        if self._on_extra == "error":
            self._problems.append(
                f"tensor {show(name)} is in {owners} but not in {', '.join(missing)}: choose --on-extra copy or drop"
            )
            return False
        verb = "copied from" if self._on_extra == "copy" else "dropped; it is in"
        self._notices.append(f"tensor {show(name)} {verb} {owners}: missing in {', '.join(missing)}")
        return self._on_extra == "copy"


def _layer_names(layers: Sequence[int], output: int, members: Sequence[Input]) -> _Names:
    """For each member, the names of one of its layers, renumbered to the output layer."""
    chosen = {id(item): layer for item, layer in zip(members, layers, strict=True)}

    def names(item: Input) -> dict[str, str]:
        structure, stack = item.structure, item.structure.main_stack
        return {
            structure.rename_layer(role.name, output): role.name
            for role in structure
            if stack is not None and role.stack == stack.prefix and role.layer == chosen[id(item)]
        }

    return names


def _lender(item: Input, name: str) -> str | None:
    """A model without a stored head lends its embedding, as tied weights mean."""
    return item.structure.tied_source(name)


def _positions(structure: Structure) -> Callable[[str], float]:
    """Where a tensor stands on a gradient: its layer's share of the depth; 0 outside the layers."""

    def position(name: str) -> float:
        role = structure.get(name)
        return role.depth if role is not None and role.depth is not None else 0.0

    return position


def _constant(t: float) -> Callable[[str], float]:
    return lambda name: t


def _range_of(entry: InputModel) -> tuple[int, int]:
    assert entry.layer_range is not None
    return entry.layer_range


def _in_order(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    return tuple(sorted(pieces, key=lambda piece: natural_key(piece.name)))

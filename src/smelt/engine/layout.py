"""Which tensors the output has, and from which tensors of which models each is made.

The tensors are those that the files hold; every one of them is accounted for. Architecture knowledge only
classifies: which layer, before or after the layers, embedding or head, which part of a model with several.
All names are the donor's: a model that calls the same tensors otherwise is read through a :class:`View`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..architecture import Module, Stack, Structure, module_of, parts
from ..checkpoint import TensorInfo
from ..errors import InputRejected, UsageError, show
from ..methods import Method
from ..recipe import InputModel, ModelReference, OutputModule, OutputSlice, Recipe, did_you_mean
from .gather import GatheredOperand
from .inputs import Input, Inputs
from .operands import CheckpointOperand, Ledger
from .parameters import check_counts
from .views import View

OnExtra = Literal["error", "copy", "drop", "merge"]


@dataclass(frozen=True, eq=False)
class Source:
    """One model's tensor that goes into an output tensor; ``entry`` is the model's place in the recipe.

    ``gathered``: its rows in the order of the output's vocabulary, where that is another one.
    """

    input: Input
    name: str
    entry: InputModel | None
    gathered: GatheredOperand | None = None

    def operand(self, ledger: Ledger | None) -> CheckpointOperand | GatheredOperand:
        """What is read of it."""
        return self.gathered or self.input.operand(self.name, ledger)

    @property
    def _stated(self) -> TensorInfo | GatheredOperand:
        return self.gathered or self.input.checkpoint.tensors[self.name]

    @property
    def dtype(self) -> str:
        return self._stated.dtype

    @property
    def native(self) -> str:
        """The dtype that outputs take after it."""
        return self._stated.native

    @property
    def shape(self) -> tuple[int, ...]:
        return self._stated.shape

    @property
    def nbytes(self) -> int:
        return self._stated.nbytes


@dataclass(frozen=True, eq=False)
class Piece:
    """One output tensor: its sources, its position t in [0, 1] on gradients, and what becomes of it.

    ``part`` and ``module`` are the slice and the module of the recipe that it belongs to. ``action`` is
    "merge", or "copy" where one source stands for all (``why`` says so).
    """

    name: str
    sources: tuple[Source, ...]
    t: float
    part: OutputSlice | None
    base: ModelReference | None
    action: Literal["merge", "copy"] = "merge"
    why: str = ""
    module: OutputModule | None = None


@dataclass(frozen=True, eq=False)
class Layout:
    """All output tensors in natural order, and notices.

    ``depths``: for each of the donor's stacks that is sliced, from which layer of the first source each output
    layer comes.
    """

    pieces: tuple[Piece, ...]
    depths: tuple[tuple[Stack, tuple[int, ...]], ...]
    notices: tuple[str, ...]


def layout(recipe: Recipe, inputs: Inputs, method: Method, on_extra: OnExtra) -> Layout:
    """The layout of a recipe. InputRejected with everything that does not fit."""
    builder = _Builder(recipe, inputs, method, on_extra)
    pieces = list(builder.from_modules() if recipe.modules is not None else builder.from_part(recipe, _WHOLE))
    return builder.finished(pieces)


def natural_key(name: str) -> list[Any]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


#: Missing tensors are told one by one up to so many.
_MOST_EXTRAS = 8

_WHOLE = Module("")


_Member = tuple[View, InputModel | None]

#: One model's contribution to a stretch of the output: output name -> source name.
_Names = Callable[[View], Mapping[str, str]]


class _Builder:
    def __init__(self, recipe: Recipe, inputs: Inputs, method: Method, on_extra: OnExtra) -> None:
        self._recipe, self._inputs, self._method, self._on_extra = recipe, inputs, method, on_extra
        self._donor = inputs.donor
        self._views = {item.label: View(item, self._donor) for item in inputs}
        self._module: OutputModule | None = None
        self._depths: dict[str, tuple[Stack, tuple[int, ...]]] = {}
        self._problems: list[str] = []
        self._extras: dict[tuple[str, str], list[str]] = {}
        self._notices = [
            f"{view.item.label}: tensors are called otherwise than in {self._donor.label}, matched by their names' ends"
            for view in self._views.values()
            if view.is_renamed
        ]

    def finished(self, pieces: Sequence[Piece]) -> Layout:
        self._report_extras()
        self._check_config()
        InputRejected.gather(dict.fromkeys(self._problems))
        ordered = tuple(sorted(pieces, key=lambda piece: natural_key(piece.name)))
        return Layout(ordered, tuple(self._depths.values()), tuple(self._notices))

    # --- modules: the parts of a model, each merged for itself ------------------------------------------

    def from_modules(self) -> Iterator[Piece]:
        """Each module's pieces, and copies of what no module holds."""
        modules = self._known_modules()
        for word, module in modules.items():
            self._module = (self._recipe.modules or {})[word]
            yield from self.from_part(self._module, module)
        self._module = None
        rest = [n for n in self._donor.checkpoint.tensors if not any(n in module for module in modules.values())]
        if rest:
            self._notices.append(f"{_listed(rest)} in none of the modules: copied from {self._donor.label}")
        base = self._recipe.base_model
        for name in rest:
            yield Piece(name, (Source(self._donor, name, None),), 0.0, None, base, "copy", "in none of the modules")

    def _known_modules(self) -> dict[str, Module]:
        """The modules of the recipe as parts of the donor. No tensor may be in two."""
        structure, given = self._donor.structure, self._recipe.modules or {}
        found = {word: module for word in given if (module := module_of(structure, word)) is not None}
        known = parts(structure)
        for word in given.keys() - found.keys():
            hint = did_you_mean(word, known) or f"; its parts are {', '.join(known[:20])}"
            self._problems.append(given[word].position.report(f"{self._donor.label} has no part {show(word)}{hint}"))
        InputRejected.gather(self._problems)
        for name in structure.roles:
            owners = [word for word, module in found.items() if name in module]
            if len(owners) > 1:
                raise UsageError(f"tensor {show(name)} is in the modules {' and '.join(owners)}: name parts that do "
                                 "not overlap")  # fmt: skip
        return found

    def from_part(self, given: Recipe | OutputModule, module: Module) -> Iterator[Piece]:
        """The pieces of a recipe's or a module's ``models`` or ``slices``."""
        return iter(self._from_models(given.models or (), module) if given.models is not None
                    else self._from_slices(given.slices or (), module))  # fmt: skip

    # --- models: the whole of each ----------------------------------------------------------------------

    def _from_models(self, models: Sequence[InputModel], module: Module) -> list[Piece]:
        members: list[_Member] = [(self._view(entry.model), entry) for entry in models]
        base = self._recipe.base_model
        if base is not None and all(view.item.label != base.text for view, _ in members):
            members.append((self._view(base), None))
        self._same_depth([view for view, _ in members], module)

        def names(view: View) -> dict[str, str]:
            return {name: own for name, own in view.names.items() if name in module}

        return self._pieces(members, names, None, base, _positions(self._donor.structure))

    def _view(self, reference: ModelReference) -> View:
        return self._views[self._inputs[reference].label]

    def _same_depth(self, views: Sequence[View], module: Module) -> None:
        depths = {v.item.label: {v.called(s.prefix): s.count for s in v.stacks} for v in views}
        first_label, first = next(iter(depths.items()))
        for label, stacks in depths.items():
            for prefix in sorted(first.keys() & stacks.keys()):
                if first[prefix] != stacks[prefix] and f"{prefix}." in module:
                    self._problems.append(
                        f"{label} has {stacks[prefix]} layers in {prefix}, {first_label} has {first[prefix]}: "
                        "models of different depth are combined by slices"
                    )
        InputRejected.gather(self._problems)

    # --- slices: layer ranges, stacked ------------------------------------------------------------------

    def _from_slices(self, slices: Sequence[OutputSlice], module: Module) -> list[Piece]:
        pieces = [*self._outside(slices[0], {"pre", "loose"}, module), *self._shared(slices[0], module)]
        layer_map: list[int] = []
        for part in slices:
            members = self._members(part, module)
            start = [_range_of(entry)[0] for _, entry in members]
            length = _range_of(members[0][1])[1] - start[0]
            for offset in range(length):
                layers = {id(view): s + offset for s, (view, _) in zip(start, members, strict=True)}
                t = offset / (length - 1) if length > 1 else 1.0
                names = self._layer_names(layers, len(layer_map), module)
                pieces += self._pieces(members, names, part, self._base_of(part), lambda name, t=t: t)  # type: ignore[misc]
                layer_map.append(start[0] + offset)
        pieces += self._outside(slices[-1], {"post"}, module)
        stack = self._views[self._donor.label].stack_of(module)
        if stack is not None:
            self._depths[stack.prefix] = stack, tuple(layer_map)
        return pieces

    def _check_config(self) -> None:
        """A new depth must be stated in the config; what speaks of layers by pattern cannot be rewritten."""
        donor, told = self._donor, dict[Any, int]()
        for stack, layer_map in self._depths.values():
            if not donor.checkpoint.config or layer_map == tuple(range(stack.count)):
                continue
            if not stack.count_keys:
                self._problems.append(
                    f"{donor.label}: config.json does not tell which key counts the layers of {stack.prefix}"
                )
            self._problems += [
                f"{donor.label}: config.json counts several stacks by {'.'.join(path)}, which cannot be both "
                f"{told[path]} and {len(layer_map)}"
                for path in stack.count_keys
                if told.setdefault(path, len(layer_map)) != len(layer_map)
            ]
            for path, value in donor.structure.patterns_of(stack).items():
                self._notices.append(f"config.json: {'.'.join(path)}: {value} speaks of layers as they were; check it")

    def _members(self, part: OutputSlice, module: Module) -> list[tuple[View, InputModel]]:
        members = [(self._view(source.model), source) for source in part.sources]
        for view, entry in members:
            first, last = _range_of(entry)
            stack, label = view.stack_of(module), view.item.label
            if stack is None:
                advice = "" if self._module else "; the parts of a model are sliced one by one, under modules"
                raise InputRejected(
                    f"{label}: no single stack of layers to slice, found {len(view.stacks)}"
                    f"{advice if len(view.stacks) > 1 else ''}"
                )
            if last > stack.count:
                raise UsageError(f"{label} has {stack.count} layers, the range asks for [{first}, {last}]")
        base = self._base_of(part)
        wanted = base is not None and self._method.base != "ignored"
        if base is not None and wanted and all(e.model.text != base.text for _, e in members):
            raise UsageError(
                f"base model {base.text} must be among the sources of each slice, with its own layer_range"
            )
        return members

    def _base_of(self, part: OutputSlice) -> ModelReference | None:
        return part.base_model or self._recipe.base_model

    def _outside(self, part: OutputSlice, kinds: set[str], module: Module) -> list[Piece]:
        """Tensors before (with loose ones) or after the layers, from the sources of one slice."""

        def names(view: View) -> dict[str, str]:
            roles = {n: view.item.structure[own] for n, own in view.names.items() if n in module}
            return {n: role.name for n, role in roles.items() if role.kind in kinds and role.stack is None}

        return self._pieces(self._members(part, module), names, part, self._base_of(part), lambda name: 0.0)

    def _shared(self, part: OutputSlice, module: Module) -> list[Piece]:
        """What a first layer holds for all: from the sources that begin with it where there are such, else all."""

        def names(view: View) -> dict[str, str]:
            roles = {n: view.item.structure[own] for n, own in view.names.items() if n in module}
            return {n: role.name for n, role in roles.items() if role.layer is None and role.stack is not None}

        members, base = self._members(part, module), self._base_of(part)
        first = [member for member in members if _range_of(member[1])[0] == 0]
        has_base = any(base is not None and entry.model.text == base.text for _, entry in first)
        chosen = members if self._method.base == "required" and not has_base else first
        return self._pieces(chosen or members, names, part, base, lambda name: 0.0)

    def _layer_names(self, layers: Mapping[int, int], output: int, module: Module) -> _Names:
        """For each model, the names of one of its layers (``layers``: by view), renumbered to the output layer."""

        def names(view: View) -> dict[str, str]:
            structure, stack = view.item.structure, view.stack_of(module)
            return {
                view.called(structure.rename_layer(own, output)): own
                for own in view.names.values()
                if stack is not None and structure[own].stack == stack.prefix
                and structure[own].layer == layers[id(view)]
            }  # fmt: skip

        return names

    # --- one stretch of the output ----------------------------------------------------------------------

    def _pieces(
        self, members: Sequence[_Member], names: _Names, part: OutputSlice | None,
        base: ModelReference | None, position: Callable[[str], float],
    ) -> list[Piece]:  # fmt: skip
        """One piece per name that any member has."""
        maps = [names(view) for view, _ in members]
        pieces = []
        for name in sorted(set().union(*maps)):
            sources = [
                Source(view.item, found, entry)
                for (view, entry), mapping in zip(members, maps, strict=True)
                if (found := mapping.get(name) or view.lent(name)) is not None
            ]
            piece = Piece(name, tuple(sources), position(name), part, base, module=self._module)
            if len(sources) < len(members):
                missing = [view.item.label for (view, _), m in zip(members, maps, strict=True) if name not in m]
                kept = self._extra(piece, missing)
                pieces += [kept] if kept is not None else []
            else:
                pieces.append(piece)
        return pieces

    def _extra(self, piece: Piece, missing: Sequence[str]) -> Piece | None:
        """What becomes of a tensor that only some models have: copied, merged of those, or dropped (None)."""
        self._extras.setdefault((_labels(piece.sources), ", ".join(missing)), []).append(piece.name)
        if self._on_extra == "merge" and self._suffices(piece):
            return piece
        if self._on_extra in ("error", "drop"):
            return None
        return replace(piece, sources=piece.sources[:1], t=0.0, action="copy", why=f"missing in {', '.join(missing)}")

    def _suffices(self, piece: Piece) -> bool:
        """Whether the method can do with the models that have the tensor."""
        labels = [source.input.label for source in piece.sources]
        has_base = piece.base is not None and self._method.base != "ignored" and piece.base.text in labels
        return not check_counts(self._method, len(labels) - has_base, has_base)

    def _report_extras(self) -> None:
        """Say of the tensors that only some models have what became of them, in one line for all alike."""
        verbs = {"copy": "copied", "drop": "dropped", "merge": "merged of these where the method can, else copied"}
        for (owners, missing), names in self._extras.items():
            subject = f"{_listed(names)} in {owners} but not in {missing}"
            if self._on_extra == "error":
                self._problems.append(f"{subject}: choose --on-extra copy, merge or drop")
            else:
                self._notices.append(f"{subject}: {verbs[self._on_extra]}")


def _listed(names: Sequence[str]) -> str:
    """Some tensors, as the subject of a sentence."""
    if len(names) == 1:
        return f"tensor {show(names[0])} is"
    rest = f" and {len(names) - _MOST_EXTRAS} more" if len(names) > _MOST_EXTRAS else ""
    return f"tensors {', '.join(map(show, names[:_MOST_EXTRAS]))}{rest} are"


def _labels(sources: Iterable[Source]) -> str:
    return ", ".join(source.input.label for source in sources)


def _positions(structure: Structure) -> Callable[[str], float]:
    """Where a tensor stands on a gradient: its layer's share of the depth; 0 outside the layers."""

    def position(name: str) -> float:
        role = structure.get(name)
        return role.depth if role is not None and role.depth is not None else 0.0

    return position


def _range_of(entry: InputModel) -> tuple[int, int]:
    assert entry.layer_range is not None
    return entry.layer_range

"""The output tensors of a plan: what each is made of, by which method, with which parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from ..architecture import TensorRole
from ..errors import InputRejected, UsageError, show
from ..kernels.dtypes import DTYPES
from ..kernels.program import Operand
from ..methods import Method, Tensor
from ..recipe import Recipe
from .changes import with_ranks
from .inputs import Inputs
from .layout import Piece, Source
from .parts import parts_of
from .settings import Resolver
from .statistics import Finder, Member, stored_bytes
from .types import common_dtype

#: What ``Output.part`` says of a tensor of the running state.
STATE = "state"

#: What to do where models have different tokens.
_ALIGN = (
    "vocabularies differ; tokenizer_source: base keeps the base's tokens, tokenizer_source: union those of all models"
)


@dataclass(frozen=True, eq=False)
class Output:
    """One tensor of the result. ``tensor`` is what the method sees, None where the first source is copied.

    ``part`` names what is made of it where the result is wanted in parts, or is the running state.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    piece: Piece
    tensor: Tensor | None
    part: str | None = None

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * DTYPES[self.dtype].bits // 8

    @property
    def input_bytes(self) -> int:
        """What is read to make it: weights, statistics, earlier state, or the base and the state after all models."""
        tensor = self.tensor
        if tensor is not None and tensor.state is not None and self.part is None:
            return bytes_of((*([tensor.base] if tensor.base is not None else []), tensor.state))
        return self._given_bytes

    @property
    def weight_bytes(self) -> int:
        """Of the tensors that are read; of the base and the factors of what the models change, where these stand."""
        base = self.tensor.base if self.tensor is not None and self.tensor.ranks else None
        if base is None:
            return sum(source.nbytes for source in self.piece.sources)
        return bytes_of([base]) + self._factor_bytes

    def bytes_read(self, passes: int) -> int:
        """In so many passes and the last, which alone makes the state and reads the base of what comes in factors."""
        if self.tensor is None or self.part == STATE:
            return self.input_bytes
        return self.input_bytes + passes * (self._factor_bytes if self.tensor.ranks else self._given_bytes)

    @property
    def _given_bytes(self) -> int:
        return self.weight_bytes + stored_bytes(self.statistics) + bytes_of(self.state)

    @property
    def _factor_bytes(self) -> int:
        return sum(change.nbytes for change in self.tensor.changes) if self.tensor is not None else 0

    @property
    def state(self) -> tuple[Operand, ...]:
        """The state that it is made from, of earlier models or of all."""
        given = (self.tensor.state or self.tensor.before,) if self.tensor is not None else ()
        return tuple(operand for operand in given if operand is not None)

    @property
    def statistics(self) -> tuple[Operand, ...]:
        """The statistics that the method uses of this tensor."""
        kinds = self.tensor.statistics.values() if self.tensor is not None else ()
        return tuple(operand for operands in kinds for operand in operands)


class OutputMaker:
    """Makes the output tensors of one recipe from the pieces of its layout.

    ``layers``: how many layers the stacks of the result have, by prefix, where that may have changed.
    """

    def __init__(self, recipe: Recipe, method: Method, inputs: Inputs, seed: int, layers: Mapping[str, int]) -> None:
        self._recipe, self._method, self._inputs, self._seed, self._layers = recipe, method, inputs, seed, layers
        self._finder = Finder(method)
        self.resolver = Resolver(recipe, method)

    def outputs(self, pieces: Sequence[Piece]) -> list[Output]:
        """One per piece. UsageError or InputRejected with all that is missing or does not fit together."""
        made = [self._output(piece) for piece in pieces]
        self.resolver.raise_missing()
        UsageError.gather(self._finder.usage_problems())
        shapes = [problem for output in made for problem in _shape_problems(output)]
        InputRejected.gather([*shapes, *self._finder.problems()])
        return made

    def in_parts(self, outputs: Sequence[Output], pieces: Sequence[Piece]) -> list[Output]:
        """The outputs that these become where the result is wanted in parts."""
        pairs = zip(outputs, pieces, strict=True)
        return [part for output, piece in pairs for part in _parts(self._method, output, piece)]

    def _output(self, piece: Piece) -> Output:
        """What one tensor is made of, and in which dtype."""
        codes, shape = [source.native for source in piece.sources], piece.sources[0].shape
        piece = self._decided(piece, codes)
        tensor = None if piece.action == "copy" else self._tensor(piece)
        return Output(piece.name, self._dtype(codes), shape, piece, tensor)

    def _dtype(self, codes: Sequence[str]) -> str:
        """out_dtype, else dtype, else the inputs' common type; integers stay what they are."""
        if not DTYPES[codes[0]].arithmetic:
            return codes[0]
        return self._recipe.written_dtype or common_dtype(codes)

    def _decided(self, piece: Piece, codes: Sequence[str]) -> Piece:
        """Copy instead of merging: buffers, integers, what ``exclude`` names and what ``only`` does not."""
        if piece.action == "copy":
            return piece
        role = piece.sources[0].input.structure.get(piece.sources[0].name)
        if not DTYPES[codes[0]].arithmetic:
            return _copied(piece, "not a floating tensor")
        if self._recipe.only and not any(chosen.matches(piece.name) for chosen in self._recipe.only):
            return _copied(piece, "not chosen by only")
        if role is not None and role.role == "buffer":
            return _copied(piece, "a buffer, not a weight")
        shared = self.resolver.shared(piece)
        if self._method.parameter("exclude") and _excluded(piece.name, shared.get("exclude", ())):
            _, models = _split(self._method, piece)
            return _copied(piece, "excluded", self._method.keeper(len(models), shared.get("task")))
        return piece

    def _tensor(self, piece: Piece) -> Tensor:
        base, merged = _split(self._method, piece)
        shared, ledger = self.resolver.shared(piece), self._inputs.ledger
        members = [self._member(source) for source in (*merged, *([base] if base is not None else []))]
        given = self._finder.of(
            piece.name, piece.sources[0].shape, shared, members[: len(merged)], *members[len(merged) :]
        )
        tensor = Tensor(
            name=piece.name,
            base=None if base is None else base.operand(ledger),
            models=tuple(source.operand(ledger) for source in merged),
            shared=shared,
            each=self.resolver.each(piece, merged),
            seed=self._seed,
            statistics=given,
            role=self._role(piece),
        )
        return with_ranks(self._method, tensor)

    def _member(self, source: Source) -> Member:
        beside = self._inputs.statistics(source.entry)
        return Member(source.input.label, source.name, beside, source.gathered is not None)

    def _role(self, piece: Piece) -> TensorRole | None:
        """The tensor's place in the result, whose layers may be others than those of its source."""
        source = piece.sources[0]
        role = source.input.roles.get(source.name)
        if role is None or role.stack is None or role.stack not in self._layers:
            return role
        return role.moved(piece.name, self._layers[role.stack])


def bytes_of(operands: Iterable[Operand]) -> int:
    """Bytes of operands that are stored as they are read."""
    return sum(operand.count * DTYPES[operand.dtype].bits // 8 for operand in operands)


def _copied(piece: Piece, why: str, keep: int | None = None) -> Piece:
    """A piece that is taken from the base (or the first model where there is none), or from model ``keep``."""
    base = [s for s in piece.sources if piece.base is not None and s.input.label == piece.base.text]
    others = [s for s in piece.sources if s not in base]
    chosen = (base or others)[0] if keep is None else others[min(keep, len(others) - 1)]
    rest = tuple(source for source in piece.sources if source is not chosen)
    return replace(piece, sources=(chosen, *rest) if why.startswith("not a") else (chosen,), action="copy", why=why)


def _excluded(name: str, patterns: Sequence[str]) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)


def _split(method: Method, piece: Piece) -> tuple[Source | None, tuple[Source, ...]]:
    """The base's source and the merged ones; for methods that know no base, every source is merged."""
    if method.base == "ignored" or piece.base is None:
        return None, piece.sources
    base = next((source for source in piece.sources if source.input.label == piece.base.text), None)
    return base, tuple(source for source in piece.sources if source is not base)


def _parts(method: Method, output: Output, piece: Piece) -> list[Output]:
    """The outputs that one tensor becomes where the result is wanted in parts."""
    if output.tensor is not None:
        parts = parts_of(method, output.tensor, output.dtype)
        return [replace(output, name=p.name, dtype=p.dtype, shape=p.shape, part=p.kind) for p in parts]
    _, models = _split(method, piece)
    if output.piece.why != "excluded":
        return []
    alone = [replace(output.piece, sources=(source,)) for source in models]
    return [replace(output, name=f"own.{task}/{output.name}", piece=piece) for task, piece in enumerate(alone)]


def _shape_problems(output: Output) -> list[str]:
    """Sources of one tensor that differ in shape or in kind."""
    sources = {source.input.label: source for source in output.piece.sources}
    if len({source.shape for source in sources.values()}) > 1:
        shapes = ", ".join(f"{label} {list(source.shape)}" for label, source in sources.items())
        first = output.piece.sources[0]
        hint = f": {_ALIGN}" if first.input.has_tokens(first.name) else ""
        return [f"tensor {show(output.name)}: shapes differ: {shapes}{hint}"]
    kinds = {DTYPES[source.dtype].arithmetic for source in sources.values()}
    if len(kinds) > 1:
        dtypes = ", ".join(f"{label} {source.dtype}" for label, source in sources.items())
        return [f"tensor {show(output.name)}: floating in some models and not in others: {dtypes}"]
    return []

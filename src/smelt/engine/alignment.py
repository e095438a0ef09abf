"""Give every tensor with a row per token the rows of the output's vocabulary, so that methods see aligned rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import InputRejected, show
from ..recipe import ModelReference, TokenRow, TokenRule
from ..tokenizer import Holder, RowMap, RowRule, map_rows, tokens_by_id
from ..tokenizer.rows import AVERAGE, MEAN, ZERO, Index
from .gather import GatheredOperand
from .inputs import Inputs
from .layout import Piece, Source
from .tokens import Tokens
from .types import common_dtype
from .views import View

_ANOTHER = -5

#: Tokens that are named of those whose rows come from the same places.
_EXAMPLES = 4


@dataclass(frozen=True)
class RowOrigin:
    """Tokens whose rows come from the same places. ``models``: label -> where its row comes from."""

    tokens: tuple[str, ...]
    count: int
    models: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        return {"tokens": list(self.tokens), "count": self.count, "models": dict(self.models)}


@dataclass(frozen=True, eq=False)
class Alignment:
    """The pieces with aligned sources, the ``names`` of those, and where rows come from that a model lacks."""

    pieces: tuple[Piece, ...]
    names: frozenset[str]
    origins: tuple[RowOrigin, ...] = ()
    notices: tuple[str, ...] = ()


def align(pieces: Sequence[Piece], tokens: Tokens, inputs: Inputs) -> Alignment:
    """Every embedding, head and output bias in the rows of the output. InputRejected when one cannot be."""
    builder = _Builder(tokens, inputs)
    made = tuple(builder.aligned(piece) if _has_tokens(piece.sources[0]) else piece for piece in pieces)
    InputRejected.gather(builder.problems)
    return Alignment(made, frozenset(builder.names), tuple(builder.origins), tuple(dict.fromkeys(builder.notices)))


def truncate(pieces: Sequence[Piece], inputs: Inputs) -> Alignment:
    """Where row counts of tokens differ, the first rows that all sources have, whatever they mean."""
    made, names, notices = [], set(), []
    for piece in pieces:
        counts = [source.shape[0] for source in piece.sources if _has_tokens(source)]
        if len(set(counts)) > 1:
            rows = min(counts)
            sources = [replace(s, gathered=_gather([s], 0, RowMap.first(0, rows), inputs)) for s in piece.sources]
            names.add(piece.name)
            notices.append(
                f"tensor {show(piece.name)}: cut to the first {rows} rows, whatever tokens they belong to; config and "
                "tokenizer stay as they are, so the result may not load (tokenizer_source: base aligns instead)"
            )
            piece = replace(piece, sources=tuple(sources))
        made.append(piece)
    return Alignment(tuple(made), frozenset(names), (), tuple(notices))


def _has_tokens(source: Source) -> bool:
    return source.input.has_tokens(source.name)


class _Builder:
    def __init__(self, tokens: Tokens, inputs: Inputs) -> None:
        assert tokens.lexicon is not None
        self._tokens, self._inputs, self._ids = tokens, inputs, tokens.lexicon.ids
        self._words = tokens_by_id(self._ids, tokens.rows)
        self._named = np.array([word is not None for word in self._words], np.bool_)
        self._holders: dict[tuple[str, int], Holder] = {}
        self.names: set[str] = set()
        self.origins: list[RowOrigin] = []
        self.notices: list[str] = []
        self.problems: list[str] = []

    def aligned(self, piece: Piece) -> Piece:
        self.names.add(piece.name)
        parties = [*piece.sources, *self._others(piece)]
        self.problems += [problem for party in parties if (problem := _axis_problem(party))]
        if self.problems:
            return piece
        holders = [self._holder(party) for party in parties]
        merged = range(len(piece.sources))
        lending = [i for i, party in enumerate(parties) if i not in merged and party.input in self._inputs.merged]
        base = next((i for i, p in enumerate(parties) if piece.base and p.input.label == piece.base.text), None)
        rules = self._rules(piece, parties)
        maps = [
            map_rows(i, holders, (merged, lending), base, self._named, rules, self._tokens.mean_blanks) for i in merged
        ]
        labels = [party.input.label for party in parties]
        self._tell(piece, maps, [holders[i] for i in merged], labels)
        sources = zip(piece.sources, maps, strict=True)
        gathered = [replace(s, gathered=_gather(parties, i, rows, self._inputs)) for i, (s, rows) in enumerate(sources)]
        return replace(piece, sources=tuple(gathered))

    def _others(self, piece: Piece) -> Iterator[Source]:
        """The same tensor in models that are not merged into this one: they may lend rows."""
        present = {source.input.label for source in piece.sources}
        for item in self._inputs:
            view = View(item, self._inputs.donor)
            name = view.names.get(piece.name) or view.lent(piece.name)
            if item.label not in present and name is not None and item.has_tokens(name):
                yield Source(item, name, None)

    def _holder(self, party: Source) -> Holder:
        key = party.input.label, party.shape[0]
        if key not in self._holders:
            ids = self._tokens.known[party.input.label].ids
            self._holders[key] = Holder.of(ids, party.shape[0], self._words)
        return self._holders[key]

    # --- rules of the recipe ----------------------------------------------------------------------------

    def _rules(self, piece: Piece, parties: Sequence[Source]) -> dict[int, RowRule]:
        index = {party.input.label: i for i, party in enumerate(parties)}
        found = {}
        for token, rule in self._tokens.rules.items():
            if rule.source is not None:
                place = self._place(token, rule, index, parties, piece.name)
                found[self._ids[token]] = RowRule(*place, rule.force)
        return found

    def _place(
        self, token: str, rule: TokenRule, index: Mapping[str, int], parties: Sequence[Source], name: str
    ) -> tuple[int, int]:
        """Lender and row of a rule."""
        source = rule.source
        model = source.model if isinstance(source, TokenRow) else source
        if not isinstance(model, ModelReference):
            return ZERO, 0
        wanted = source.token if isinstance(source, TokenRow) else token
        number = source.token_id if isinstance(source, TokenRow) else None
        row = self._tokens.known[model.text].ids[str(wanted)] if number is None else number
        if model.text not in index or row >= parties[index[model.text]].shape[0]:
            self.problems.append(f"token {show(token)}: {model.text} has no row {row} in a tensor like {show(name)}")
            return ZERO, 0
        return index[model.text], row

    # --- what is told -----------------------------------------------------------------------------------

    def _tell(self, piece: Piece, maps: Sequence[RowMap], holders: Sequence[Holder], labels: Sequence[str]) -> None:
        zero = np.all([rows.lender == ZERO for rows in maps], axis=0) & self._named
        zero[[self._ids[token] for token, rule in self._tokens.rules.items() if rule.source == "zero"]] = False
        if zero.any():
            words = ", ".join(show(self._words[i], 20) for i in np.flatnonzero(zero)[:_EXAMPLES])
            self.notices.append(
                f"tensor {show(piece.name)}: {zero.sum()} tokens have no row in any model: zero ({words})"
            )
        if not self.origins:
            table = np.stack([_lenders(i, rows, holders[i]) for i, rows in enumerate(maps)], axis=1)
            self.origins = list(self._origins(table, labels))

    def _origins(self, table: Index, labels: Sequence[str]) -> Iterator[RowOrigin]:
        """Tokens that some model has no row of its own for, gathered by where the rows come from."""
        foreign = (table != np.arange(table.shape[1])).any(axis=1) & self._named
        moved = {self._ids[token] for token, rule in self._tokens.rules.items() if rule.source is not None}
        foreign[list(moved)] = True
        for places in np.unique(table[foreign], axis=0):
            rows = np.flatnonzero(foreign & (table == places).all(axis=1))
            examples = tuple(str(self._words[row]) for row in rows[:_EXAMPLES])
            models = {labels[i]: _origin(i, int(place), labels) for i, place in enumerate(places)}
            yield RowOrigin(examples, len(rows), models)


def _lenders(own: int, rows: RowMap, holder: Holder) -> Index:
    """Where each row comes from, with a sign of its own for the model's row of another token."""
    another = (rows.lender == own) & (rows.row != holder.own)
    return np.where(another, _ANOTHER, rows.lender)


def _origin(own: int, lender: int, labels: Sequence[str]) -> str:
    words = {
        own: "its own", ZERO: "zero", MEAN: "the mean of its rows", AVERAGE: "the mean of the models that have it",
        _ANOTHER: "its row of another token",
    }  # fmt: skip
    return words[lender] if lender in words else labels[lender]


def _axis_problem(party: Source) -> str | None:
    axis = party.input.structure.vocabulary_axis(party.name)
    if axis == 0:
        return None
    return (
        f"{party.input.label}: tensor {show(party.name)} {list(party.shape)} has a column per token, "
        "vocabularies are aligned by rows only"
    )


def _gather(parties: Sequence[Source], own: int, rows: RowMap, inputs: Inputs) -> GatheredOperand | None:
    """The operand that reads the rows, or None where they lie as they should."""
    source = parties[own]
    if rows.is_identity(own, source.shape[0]):
        return None
    used = sorted({own, *rows.lenders()})
    operands = {index: parties[index].input.operand(parties[index].name, inputs.ledger) for index in used}
    dtype = common_dtype(operand.dtype for operand in operands.values())
    native = common_dtype(operand.native for operand in operands.values())
    return GatheredOperand(source.input.label, source.name, operands, rows, dtype, native)

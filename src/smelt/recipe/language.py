"""What a recipe says, checked and immutable. ``reading`` makes these records, the engine reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from .nodes import Position
from .settings import Condition, Setting

Parameters = Mapping[str, Setting]
Level = Literal["source", "slice", "module", "recipe"]


class AdapterReference(NamedTuple):
    """An adapter by path or hub id, its branch, tag or commit, and how much of its change is added."""

    path: str
    revision: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class ModelReference:
    """Which model is meant. References are equal when their ``text`` is.

    Attributes
    ----------
    text: how to name it, in one way whatever the form it was written in.
    path: a local folder, a single file or a hub id; the name of another document; a made-up one for an inline recipe.
    revision: hub branch, tag or commit.
    adapters: what is applied to it.
    override_architecture: replaces ``architectures[0]`` of the model's config.
    recipe: the inline recipe whose result is meant.
    """

    text: str
    path: str = field(compare=False)
    position: Position = field(compare=False, repr=False)
    revision: str | None = field(default=None, compare=False)
    adapters: tuple[AdapterReference, ...] = field(default=(), compare=False)
    override_architecture: str | None = field(default=None, compare=False)
    recipe: Recipe | None = field(default=None, compare=False, repr=False)

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the model and of its adapters."""
        return self.path, *(adapter.path for adapter in self.adapters)


@dataclass(frozen=True)
class InputModel:
    """A model that is merged, and the parameters given beside it.

    ``layer_range`` is [first, last) and set exactly for the sources of a slice; ``statistics`` names a
    statistics checkpoint.
    """

    model: ModelReference
    parameters: Parameters
    position: Position = field(compare=False, repr=False)
    layer_range: tuple[int, int] | None = None
    statistics: ModelReference | None = None

    @property
    def layers(self) -> int:
        """How many layers the range spans (0 without one)."""
        return self.layer_range[1] - self.layer_range[0] if self.layer_range else 0


@dataclass(frozen=True)
class OutputSlice:
    """A block of output layers, merged from equally many layers of each source."""

    sources: tuple[InputModel, ...]
    parameters: Parameters
    position: Position = field(compare=False, repr=False)
    base_model: ModelReference | None = None
    residual_weight: float | None = None

    @property
    def layers(self) -> int:
        return self.sources[0].layers


@dataclass(frozen=True)
class OutputModule:
    """One part of a model with several (an encoder, a decoder): either ``slices`` or ``models``."""

    slices: tuple[OutputSlice, ...] | None
    models: tuple[InputModel, ...] | None
    parameters: Parameters
    position: Position = field(compare=False, repr=False)


@dataclass(frozen=True)
class TokenRow:
    """Another token's row: of ``model``, by its text or by its id (exactly one)."""

    model: ModelReference
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True)
class TokenRule:
    """Where a token's embedding comes from: the model's own row of it, another row, or "zero".

    ``force`` uses it for all models, not only for those that lack the token.
    """

    source: ModelReference | TokenRow | str | None
    force: bool = False


@dataclass(frozen=True)
class TokenizerOptions:
    """The ``tokenizer`` section. ``source`` is "union", "base" or a model.

    ``padding`` says what becomes of rows that no token has: "keep", "drop", or None to keep them where all
    models have some.
    """

    source: ModelReference | str = "union"
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    padding: str | None = None

    def lenders(self) -> Iterator[ModelReference]:
        """The models that rules of tokens take rows from."""
        for rule in self.tokens.values():
            source = rule.source.model if isinstance(rule.source, TokenRow) else rule.source
            if isinstance(source, ModelReference):
                yield source


@dataclass(frozen=True)
class OutputOptions:
    """The ``output`` section. ``dtype`` is a safetensors code, ``shard_size`` is in bytes.

    ``packing``: the quantised type that matrices are written as, in its place. ``scales``: of FP8, "fresh" or "base".
    """

    dtype: str | None = None
    shard_size: int | None = None
    format: str = "safetensors"
    packing: str | None = None
    scales: str | None = None


class PlacedSetting(NamedTuple):
    """A setting and where in the recipe it was given: ``where`` like "slices[0].sources[1]"."""

    where: str
    name: str
    setting: Setting
    level: Level


@dataclass(frozen=True)
class Recipe:
    """One document. Exactly one of ``models``, ``slices`` and ``modules`` is set.

    Attributes
    ----------
    method: as written; whether it exists is for the registry to say.
    only: filters; tensors that none of them matches stay as in the base (conditions without a value).
    dtype: inputs are cast to this when read (safetensors code, "BF16").
    out_dtype: merged tensors are cast to this when written.
    scope: of order statistics: "tensor" or "model".
    lines: scaling by layer of what is merged (LiNeS): settings of one value each.
    tokenizer_source: the older form of ``tokenizer.source``; never both.
    text: the document as it was written; origin: the file's name, for messages.
    where: the position of each top-level key that was given.
    notices: what is worth telling the user, each with its place.
    """

    method: str
    models: tuple[InputModel, ...] | None = None
    slices: tuple[OutputSlice, ...] | None = None
    modules: Mapping[str, OutputModule] | None = None
    base_model: ModelReference | None = None
    parameters: Parameters = field(default_factory=dict)
    only: tuple[Condition, ...] = ()
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: ModelReference | str | None = None
    tokenizer: TokenizerOptions | None = None
    chat_template: str | None = None
    name: str | None = None
    seed: int | None = None
    scope: str | None = None
    lines: Parameters | None = None
    output: OutputOptions | None = None
    text: str = field(default="", compare=False, repr=False)
    origin: str = field(default="<recipe>", compare=False)
    where: Mapping[str, Position] = field(default_factory=dict, compare=False, repr=False)
    notices: tuple[str, ...] = field(default=(), compare=False)

    @property
    def written_dtype(self) -> str | None:
        """The dtype to write in when the recipe names one: ``out_dtype``, ``output.dtype`` or ``dtype``."""
        return self.out_dtype or (self.output and self.output.dtype) or self.dtype

    @property
    def in_parts(self) -> bool:
        """Whether the parts of the result are wanted in its place."""
        return self.output is not None and self.output.format == "parts"

    @property
    def vocabulary(self) -> TokenizerOptions | None:
        """The ``tokenizer`` section in either form, or None."""
        return self.tokenizer if self.tokenizer_source is None else TokenizerOptions(self.tokenizer_source)

    def position(self, key: str) -> Position:
        """Where a top-level key was given, or the document's start."""
        return self.where.get(key, Position(self.origin, 1, 1) if self.where else Position(self.origin))

    def inputs(self) -> Iterator[tuple[str, InputModel]]:
        """(where, input) for every model in any of the three forms, in file order."""
        yield from _inputs("", self.models, self.slices)
        for name, module in (self.modules or {}).items():
            yield from _inputs(f"modules.{name}.", module.models, module.slices)

    def output_slices(self) -> Iterator[tuple[str, OutputSlice]]:
        """(where, slice) for every slice, those of modules included."""
        yield from _slices("", self.slices)
        for name, module in (self.modules or {}).items():
            yield from _slices(f"modules.{name}.", module.slices)

    def references(self) -> Iterator[ModelReference]:
        """Every model that takes part: inputs in file order, then bases; repeated as often as named."""
        yield from (given.model for _, given in self.inputs())
        yield from (piece.base_model for _, piece in self.output_slices() if piece.base_model)
        if self.base_model:
            yield self.base_model

    def statistics(self) -> Iterator[ModelReference]:
        """The statistics checkpoints given beside the inputs, in file order."""
        return (given.statistics for _, given in self.inputs() if given.statistics)

    def token_references(self) -> Iterator[ModelReference]:
        """Every model that lends its tokenizer or single rows, whether it is merged or not."""
        if self.vocabulary is not None:
            if isinstance(self.vocabulary.source, ModelReference):
                yield self.vocabulary.source
            yield from self.vocabulary.lenders()

    def all_settings(self) -> Iterator[PlacedSetting]:
        """Every setting at every level."""
        for where, given in self.inputs():
            yield from _placed(where, given.parameters, "source")
        for where, piece in self.output_slices():
            yield from _placed(where, piece.parameters, "slice")
        for name, module in (self.modules or {}).items():
            yield from _placed(f"modules.{name}", module.parameters, "module")
        yield from _placed("", self.parameters, "recipe")


def _inputs(
    prefix: str, models: tuple[InputModel, ...] | None, slices: tuple[OutputSlice, ...] | None
) -> Iterator[tuple[str, InputModel]]:
    for i, model in enumerate(models or ()):
        yield f"{prefix}models[{i}]", model
    for where, piece in _slices(prefix, slices):
        for i, source in enumerate(piece.sources):
            yield f"{where}.sources[{i}]", source


def _slices(prefix: str, slices: tuple[OutputSlice, ...] | None) -> Iterator[tuple[str, OutputSlice]]:
    return ((f"{prefix}slices[{i}]", piece) for i, piece in enumerate(slices or ()))


def _placed(where: str, parameters: Parameters, level: Level) -> Iterator[PlacedSetting]:
    return (PlacedSetting(where, name, setting, level) for name, setting in parameters.items())

"""The plan: from recipe and headers alone, every output tensor, its operands, passes, bytes and memory.

Every error that can be known before a weight is read surfaces here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import isgeneratorfunction
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import storage
from ..architecture import TensorRole
from ..errors import InputRejected, UsageError, show
from ..kernels.dtypes import DTYPES
from ..kernels.program import Operand
from ..methods import Method, Tensor, get
from ..recipe import Recipe, not_yet, parse, parse_mapping
from .alignment import Alignment, align, truncate
from .inputs import Inputs, Places
from .layout import Layout, Piece, Source, layout
from .options import BASELINE, SHARD_SIZE, Options
from .parameters import check_counts, parts_problems
from .parts import parts_of
from .settings import Resolver, check_lines, check_settings, unmatched_filters, whole_model_values, with_lines
from .side_files import id_notices, side_files
from .statistics import Finder, Member, stored_bytes
from .tiles import TILE
from .tokenizing import plan_tokens
from .tokens import Tokens
from .types import common_dtype
from .views import contains

#: What to do where models have different tokens.
_ALIGN = (
    "vocabularies differ; tokenizer_source: base keeps the base's tokens, tokenizer_source: union those of all models"
)


@dataclass(frozen=True, eq=False)
class Output:
    """One tensor of the result. ``tensor`` is what the method sees, None where the first source is copied.

    ``part`` names what is made of it where the result is wanted in parts.
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
        """Of weights and statistics, as they are stored."""
        weights = sum(source.nbytes for source in self.piece.sources)
        return weights + stored_bytes(self.statistics)

    @property
    def statistics(self) -> tuple[Operand, ...]:
        """The statistics that the method uses of this tensor."""
        kinds = self.tensor.statistics.values() if self.tensor is not None else ()
        return tuple(operand for operands in kinds for operand in operands)


@dataclass(frozen=True, eq=False)
class Plan:
    """The exact work. ``stages`` are the plans of the recipes whose results this one takes, which the figures
    do not count, but for ``disk_needed``. ``paths`` are local ones that the recipe's text names beside those
    of the inputs. ``measured`` are per-model parameters that came from files: (model, values). ``close()``
    releases the inputs.
    """

    recipe: Recipe
    method: Method
    variant: str
    seed: int
    options: Options
    inputs: Inputs
    layout: Layout
    outputs: tuple[Output, ...]
    notices: list[str] = field(default_factory=list)
    tokens: Tokens | None = None
    alignment: Alignment | None = None
    stages: tuple[Plan, ...] = ()
    paths: tuple[str, ...] = ()
    measured: tuple[tuple[str, dict[str, float]], ...] = ()

    @property
    def passes(self) -> tuple[int, int]:
        """(readings of all inputs for whole-model statistics, passes over a tensor's tiles before its output)."""
        merged = [output.tensor.shared for output in self.outputs if output.tensor is not None]
        return self.method.passes(dict(merged[0])) if merged else (0, 0)

    @property
    def bytes_read(self) -> int:
        """Bytes read from the inputs; what a statistic reads again comes from the system's page cache."""
        again = sum(self.passes)
        return sum(output.input_bytes * (1 if output.tensor is None else 1 + again) for output in self.outputs)

    @property
    def shard_size(self) -> int:
        """Bytes per weight file: the caller's, else the recipe's, else 5 GB."""
        recipes = self.recipe.output.shard_size if self.recipe.output else None
        return self.options.shard_size or recipes or SHARD_SIZE

    @property
    def bytes_written(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    @property
    def disk_needed(self) -> int:
        """Weights with their headers, and the side files; those of the stages too."""
        own = self.bytes_written + 512 * len(self.outputs) + sum(map(len, self.side_files().values())) + (1 << 20)
        return own + sum(stage.disk_needed for stage in self.stages)

    def side_files(self) -> dict[str, bytes]:
        """What is written beside the weights, but for config, card and manifest."""
        return side_files(self.inputs.donor.checkpoint, self.tokens)

    @property
    def peak_memory(self) -> int:
        """Expected resident memory in bytes: the process itself, vocabularies, and the tiles in flight."""
        most = max((self._tile_bytes(output) for output in self.outputs), default=0)
        vocabulary = 0 if self.tokens is None else self.tokens.memory
        return BASELINE + vocabulary + self.options.threads * most

    def _tile_bytes(self, output: Output) -> int:
        """Memory that one thread needs for one tile: the operands, the result, and as much again in counters."""
        operands = sum(source.nbytes for source in output.piece.sources)
        beside = sum(operand.count * DTYPES[operand.dtype].bits // 8 for operand in output.statistics)
        row, more = (1, 0) if output.tensor is None else self.method.holds(output.tensor)
        held = min(output.count, TILE + row - 1)
        tile = held / max(1, output.count)
        return int(2 * tile * (operands + beside + output.nbytes)) + held * more + (4 << 20)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "method": self.method.name, "variant": self.variant, "seed": self.seed, "tensors": len(self.outputs),
            "parameters": sum(output.count for output in self.outputs),
            "layers": {stack.prefix: len(layer_map) for stack, layer_map in self.layout.depths},
            "passes": {"whole_model": self.passes[0], "per_tensor": self.passes[1]},
            "bytes_read": self.bytes_read, "bytes_written": self.bytes_written, "disk_needed": self.disk_needed,
            "peak_memory": self.peak_memory, "threads": self.options.threads, "device": self.options.device,
            "inputs": [item.label for item in self.inputs], "statistics": list(self.inputs.beside),
            "vocabulary": self.vocabulary(), "stages": [stage.as_dict() for stage in self.stages],
            "notices": self.notices, "rows": self.rows(),
        }  # fmt: skip

    def vocabulary(self) -> dict[str, Any] | None:
        """Tokens, rows and where rows come from that not all models have; None where nothing is aligned."""
        if self.tokens is None or self.tokens.lexicon is None or self.alignment is None:
            return None
        return {
            "donor": self.tokens.donor.label, "tokens": len(self.tokens.lexicon.ids), "rows": self.tokens.rows,
            "added": len(self.tokens.lexicon.added), "removed": len(self.tokens.lexicon.removed),
            "origins": [origin.as_dict() for origin in self.alignment.origins],
        }  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """One row per output tensor."""
        return [
            {
                "tensor": output.name, "dtype": output.dtype, "shape": list(output.shape), "bytes": output.nbytes,
                "action": "merge" if output.tensor is not None else "copy", "why": output.piece.why,
                "from": [f"{source.input.label}:{source.name}" for source in output.piece.sources],
                "statistics": sorted(output.tensor.statistics) if output.tensor is not None else [],
                "parameters": _shown(output.tensor),
            }
            for output in self.outputs
        ]  # fmt: skip

    def close(self) -> None:
        for made in (*self.stages, self):
            made.inputs.close()


def _shown(tensor: Tensor | None) -> dict[str, Any]:
    if tensor is None:
        return {}
    return {**tensor.shared, **{name: list(values) for name, values in tensor.each.items()}}


#: How many layers a stack of the result has, by prefix, where that may have changed.
Layers = Mapping[str, int]
RecipeLike = str | Path | Mapping[str, Any] | Recipe | Sequence[Recipe]


def read_recipes(recipe: RecipeLike) -> Sequence[Recipe]:
    """The documents of a recipe file, or of what stands for one."""
    if isinstance(recipe, Recipe):
        return [recipe]
    if isinstance(recipe, Mapping):
        return parse_mapping(recipe)
    if not isinstance(recipe, str | Path):
        return recipe
    path = Path(recipe)
    if not path.is_file():
        raise UsageError(f"no such recipe file: {show(recipe)}")
    try:
        return parse(storage.read_small(path, 1 << 20).decode("utf-8"), str(recipe))
    except UnicodeDecodeError as error:
        raise UsageError(f"{show(recipe)} is not UTF-8 text: {error}") from error


def make_plan(recipe: Recipe, options: Options, places: Places = MappingProxyType({})) -> Plan:
    """Check the recipe against the registry, open the inputs, lay out the output, resolve parameters.

    ``places``: where the names of models lead that are neither paths nor on the hub.
    """
    method = get(recipe.method)
    problems = [*not_yet(recipe), *check_settings(recipe, method), *_counts(recipe, method)]
    in_parts = parts_problems(method, "task" in recipe.parameters) if recipe.in_parts else []
    problems += check_lines(recipe)
    UsageError.gather([*problems, *in_parts, *_idle_statistics(recipe, method)])
    method = with_lines(recipe, method)
    UsageError.gather(_counts(recipe, method))
    inputs = Inputs(recipe, places, raw=options.raw)
    try:
        return _planned(recipe, method, options, inputs)
    except BaseException:
        inputs.close()
        raise


def _idle_statistics(recipe: Recipe, method: Method) -> list[str]:
    """Statistics beside models of a method that knows none."""
    given = () if method.statistics else recipe.statistics()
    return [reference.position.report(f"{method.name} uses no statistics") for reference in given]


def _counts(recipe: Recipe, method: Method) -> list[str]:
    """What is wrong with the number of inputs, for each group that is merged together."""
    base = recipe.base_model
    modules = [module.models for module in (recipe.modules or {}).values()]
    whole = [models for models in (recipe.models, *modules) if models is not None]
    problems = []
    for group in (*whole, *(part.sources for _, part in recipe.output_slices())):
        names = [entry.model.text for entry in group]
        if method.base == "ignored":
            extra = base is not None and group in whole and base.text not in names
            problems += check_counts(method, len(names) + extra, False)
        else:
            problems += check_counts(method, len(names) - (base is not None and base.text in names), base is not None)
    return list(dict.fromkeys(problems))


def _planned(recipe: Recipe, method: Method, options: Options, inputs: Inputs) -> Plan:
    inputs.refuse_quantised()
    _widen(inputs, options)
    chart = layout(recipe, inputs, method, options.on_extra)
    tokens, alignment = _tokens(recipe, inputs, chart, options)
    chart = replace(chart, pieces=alignment.pieces) if alignment is not None else chart
    resolver = Resolver(recipe, method)
    seed = options.seed if options.seed is not None else (recipe.seed or 0)
    finder = Finder(method)
    layers = {stack.prefix: len(layer_map) for stack, layer_map in chart.depths}
    outputs = [_output(recipe, method, piece, resolver, inputs, finder, seed, layers) for piece in chart.pieces]
    resolver.raise_missing()
    UsageError.gather(finder.usage_problems())
    merged = [output.tensor for output in outputs if output.tensor is not None]
    shapes = [problem for output in outputs for problem in _shape_problems(output)]
    InputRejected.gather([*shapes, *finder.problems()])
    if method.survey is not None and method.passes(dict(merged[0].shared))[0] if merged else False:
        UsageError.gather(whole_model_values(method, [(dict(t.shared), dict(t.each)) for t in merged]))
    method.check_layers(merged)
    _ask(method, merged)
    names = [source.name for output in outputs for source in output.piece.sources]
    filters = unmatched_filters(recipe, names, [output.name for output in outputs])
    if options.strict:
        UsageError.gather(filters)
    notices = [*recipe.notices, *inputs.notices(), *chart.notices, *filters]
    if recipe.in_parts:
        pairs = zip(outputs, chart.pieces, strict=True)
        outputs = [part for output, piece in pairs for part in _parts(method, output, piece)]
    notices += [*tokens.notices, *id_notices(inputs.donor.checkpoint, tokens)] if tokens is not None else []
    notices += alignment.notices if alignment is not None else ()
    made = Plan(
        recipe, method, resolver.variant, seed, options, inputs, chart, tuple(outputs), notices,
        tokens=None if tokens is None else replace(tokens, known={}), alignment=alignment,
        measured=resolver.measured(),
    )  # fmt: skip
    UsageError.gather(_memory_problems(made))
    return made


def _tokens(recipe: Recipe, inputs: Inputs, chart: Layout, options: Options) -> tuple[Tokens | None, Alignment | None]:
    """The output's tokenizer where it is not the donor's as it is, and the tensors aligned to its vocabulary."""
    if options.raw:
        asked = [key for key in ("tokenizer", "tokenizer_source", "chat_template") if key in recipe.where]
        UsageError.gather(f"{key} has no meaning for bare tensors: leave it out, or merge without raw" for key in asked)
    if options.truncate_embeddings and (options.raw or recipe.vocabulary is not None):
        why = "for bare tensors" if options.raw else "beside a tokenizer section, which aligns the rows"
        raise UsageError(f"truncate_embeddings has no effect {why}")
    tokens = None if options.raw else plan_tokens(recipe, inputs, keep_rows=options.truncate_embeddings)
    if options.truncate_embeddings:
        return tokens, truncate(chart.pieces, inputs)
    return tokens, align(chart.pieces, tokens, inputs) if tokens is not None and tokens.lexicon is not None else None


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


def _widen(inputs: Inputs, options: Options) -> None:
    """A text model that is merged with one that also sees: the result is of the second kind."""
    wider = [item for item in inputs.merged if item is not inputs.donor and contains(item, inputs.donor)]
    if wider and options.on_extra != "drop":
        inputs.donor = wider[0]


def _ask(method: Method, tensors: Sequence[Tensor]) -> None:
    """Ask for outputs that need no statistics: parameters that have no result are refused before the run."""
    if not isgeneratorfunction(method.merge):
        for tensor in tensors:
            method.merge(tensor)


def _memory_problems(made: Plan) -> list[str]:
    needed, given = made.peak_memory, made.options.memory
    if needed <= given:
        return []
    return [f"memory: {needed >> 20}MiB are needed with {made.options.threads} threads, {given >> 20}MiB allowed"]


def _output(
    recipe: Recipe, method: Method, piece: Piece, resolver: Resolver, inputs: Inputs, finder: Finder, seed: int,
    layers: Layers,
) -> Output:  # fmt: skip
    """One output tensor: what it is made of, in which dtype. ``layers``: of the stacks whose depth is new."""
    codes, shape = [source.dtype for source in piece.sources], piece.sources[0].shape
    piece = _decided(recipe, piece, method, resolver, codes)
    dtype = _dtype(recipe, codes)
    tensor = None if piece.action == "copy" else _tensor(method, piece, resolver, inputs, finder, seed, layers)
    return Output(piece.name, dtype, shape, piece, tensor)


def _dtype(recipe: Recipe, codes: Sequence[str]) -> str:
    """out_dtype, else dtype, else the inputs' common type; integers stay what they are."""
    if not DTYPES[codes[0]].arithmetic:
        return codes[0]
    return recipe.written_dtype or common_dtype(codes)


def _decided(recipe: Recipe, piece: Piece, method: Method, resolver: Resolver, codes: Sequence[str]) -> Piece:
    """Copy instead of merging: buffers, integers, what ``exclude`` names and what ``only`` does not."""
    if piece.action == "copy":
        return piece
    role = piece.sources[0].input.structure.get(piece.sources[0].name)
    if not DTYPES[codes[0]].arithmetic:
        return _copied(piece, "not a floating tensor")
    if recipe.only and not any(chosen.matches(piece.name) for chosen in recipe.only):
        return _copied(piece, "not chosen by only")
    if role is not None and role.role == "buffer":
        return _copied(piece, "a buffer, not a weight")
    shared = resolver.shared(piece)
    if method.parameter("exclude") and _excluded(piece.name, shared.get("exclude", ())):
        _, models = _split(method, piece)
        return _copied(piece, "excluded", method.keeper(len(models), shared.get("task")))
    return piece


def _copied(piece: Piece, why: str, keep: int | None = None) -> Piece:
    """A piece that is taken from the base (or the first model where there is none), or from model ``keep``."""
    base = [s for s in piece.sources if piece.base is not None and s.input.label == piece.base.text]
    others = [s for s in piece.sources if s not in base]
    chosen = (base or others)[0] if keep is None else others[min(keep, len(others) - 1)]
    rest = tuple(source for source in piece.sources if source is not chosen)
    return replace(piece, sources=(chosen, *rest) if why.startswith("not a") else (chosen,), action="copy", why=why)


def _excluded(name: str, patterns: Sequence[str]) -> bool:
    import re

    return any(re.match(pattern, name) for pattern in patterns)


def _tensor(
    method: Method, piece: Piece, resolver: Resolver, inputs: Inputs, finder: Finder, seed: int, layers: Layers
) -> Tensor:
    base, merged = _split(method, piece)
    shared = resolver.shared(piece)
    members = [_member(source, inputs) for source in (*merged, *([base] if base is not None else []))]
    shape = piece.sources[0].shape
    return Tensor(
        name=piece.name,
        base=None if base is None else base.operand(inputs.ledger),
        models=tuple(source.operand(inputs.ledger) for source in merged),
        shared=shared,
        each=resolver.each(piece, merged),
        seed=seed,
        statistics=finder.of(piece.name, shape, shared, members[: len(merged)], *members[len(merged) :]),
        role=_role(piece, layers),
    )


def _member(source: Source, inputs: Inputs) -> Member:
    return Member(source.input.label, source.name, inputs.statistics(source.entry), source.gathered is not None)


def _role(piece: Piece, layers: Layers) -> TensorRole | None:
    """The tensor's place in the result, whose layers may be others than those of its source."""
    source = piece.sources[0]
    role = source.input.roles.get(source.name)
    if role is None or role.stack is None or role.stack not in layers:
        return role
    return role.moved(piece.name, layers[role.stack])


def _split(method: Method, piece: Piece) -> tuple[Source | None, tuple[Source, ...]]:
    """The base's source and the merged ones; for methods that know no base, every source is merged."""
    if method.base == "ignored" or piece.base is None:
        return None, piece.sources
    base = next((source for source in piece.sources if source.input.label == piece.base.text), None)
    return base, tuple(source for source in piece.sources if source is not base)


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

"""The plan: from recipe and headers alone, every output tensor, its operands, passes, bytes and memory.

Every error that can be known before a weight is read surfaces here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import isgeneratorfunction
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .. import storage
from ..checkpoint import TensorInfo
from ..errors import UsageError, show
from ..kernels.dtypes import DTYPES
from ..methods import Method, Tensor, get
from ..recipe import Recipe, not_yet, parse, parse_mapping
from .alignment import Alignment, align, truncate
from .budget import Budget
from .inputs import Inputs, Places
from .layout import Layout, layout
from .options import SHARD_SIZE, Options
from .outputs import Output, OutputMaker
from .parameters import check_counts, parts_problems
from .settings import check_lines, check_settings, unmatched_filters, whole_model_values, with_lines
from .side_files import id_notices, side_files
from .tokenizing import plan_tokens
from .tokens import Tokens
from .views import contains

if TYPE_CHECKING:
    from ..checkpoint.gguf import GgufLayout
    from .earlier import Earlier
    from .float8 import Float8
    from .running import Running


@dataclass(frozen=True, eq=False)
class Plan:
    """The exact work. ``stages`` are the plans of the recipes whose results this one takes, which the figures
    do not count, but for ``disk_needed``. ``paths`` are local ones that the recipe's text names beside those
    of the inputs. ``measured`` are per-model parameters that came from files: (model, values). ``gguf`` is where
    everything lies in the one file that is wanted of that format, ``float8`` what is written in FP8, ``running`` the
    state that is made before the outputs where the merge can be continued. ``close()`` releases the inputs.
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
    gguf: GgufLayout | None = None
    float8: Float8 | None = None
    running: Running | None = None

    @property
    def made(self) -> tuple[Output, ...]:
        """All tensors that are written: those of the state, and the outputs."""
        return (*(self.running.outputs if self.running is not None else ()), *self.outputs)

    @property
    def passes(self) -> tuple[int, int]:
        """(readings of all inputs for whole-model statistics, passes over a tensor's tiles before its output)."""
        merged = [output.tensor.shared for output in self.outputs if output.tensor is not None]
        return self.method.passes(dict(merged[0])) if merged else (0, 0)

    @property
    def bytes_read(self) -> int:
        """Bytes read from the inputs; what a statistic reads again comes from the system's page cache."""
        return sum(output.bytes_read(sum(self.passes)) for output in self.made)

    @property
    def shard_size(self) -> int:
        """Bytes per weight file: the caller's, else the recipe's, else 5 GB."""
        recipes = self.recipe.output.shard_size if self.recipe.output else None
        return self.options.shard_size or recipes or SHARD_SIZE

    @property
    def bytes_written(self) -> int:
        return self.gguf.size if self.gguf is not None else sum(info.nbytes for info in self.stored())

    @property
    def bytes_made(self) -> int:
        """Of the tensors as they are computed: more than is written where that is quantised."""
        return sum(output.count * DTYPES[self.dtype_made(output)].bits // 8 for output in self.made)

    def dtype_made(self, output: Output) -> str:
        """The dtype that a tensor is computed in: float32 where that is quantised on its way to the disk."""
        return "F32" if self.float8 is not None and output.name in self.float8.forms else output.dtype

    def stored(self) -> list[TensorInfo]:
        """The tensors of safetensors files, one by one."""
        return [info for output in self.made for info in self._stored(output)]

    def _stored(self, output: Output) -> list[TensorInfo]:
        if self.float8 is None:
            return [TensorInfo(output.name, output.dtype, output.shape)]
        return list(self.float8.stored(output))

    @property
    def disk_needed(self) -> int:
        """Weights with their headers, and the side files; those of the stages too."""
        own = self.bytes_written + 512 * len(self.made) + sum(map(len, self.side_files().values())) + (1 << 20)
        own += 0 if self.float8 is None else self.float8.spooled(self.options.threads)
        return own + sum(stage.disk_needed for stage in self.stages)

    def side_files(self) -> dict[str, bytes]:
        """What is written beside the weights, but for config, card and manifest."""
        return side_files(self.inputs.donor.checkpoint, self.tokens)

    @cached_property
    def budget(self) -> Budget:
        """What it takes in memory, and what for."""
        return Budget(self)

    @property
    def peak_memory(self) -> int:
        """Resident memory in bytes, at most."""
        return self.budget.peak

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "method": self.method.name, "variant": self.variant, "seed": self.seed, "tensors": len(self.outputs),
            "parameters": sum(output.count for output in self.outputs),
            "layers": {stack.prefix: len(layer_map) for stack, layer_map in self.layout.depths},
            "passes": {"whole_model": self.passes[0], "per_tensor": self.passes[1]},
            "bytes_read": self.bytes_read, "bytes_written": self.bytes_written, "disk_needed": self.disk_needed,
            "peak_memory": self.peak_memory, "threads": self.options.threads, "device": self.options.device,
            "state_bytes": sum(output.nbytes for output in self.made) - sum(output.nbytes for output in self.outputs),
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
                "tensor": output.name, "dtype": self._stored(output)[0].dtype, "shape": list(output.shape),
                "bytes": sum(info.nbytes for info in self._stored(output)),
                "action": "merge" if output.tensor is not None else "copy", "why": output.piece.why,
                "from": [f"{source.input.label}:{source.name}" for source in output.piece.sources],
                "statistics": sorted(output.tensor.statistics) if output.tensor is not None else [],
                "ranks": list(output.tensor.ranks) if output.tensor is not None else [],
                "parameters": _shown(output.tensor),
            }
            for output in self.outputs
        ]  # fmt: skip

    def close(self) -> None:
        for made in (*self.stages, self):
            made.inputs.close()
        if self.running is not None:
            self.running.close()


def _shown(tensor: Tensor | None) -> dict[str, Any]:
    if tensor is None:
        return {}
    return {**tensor.shared, **{name: list(values) for name, values in tensor.each.items()}}


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


def make_plan(
    recipe: Recipe, options: Options, places: Places = MappingProxyType({}), earlier: Earlier | None = None
) -> Plan:
    """Check the recipe against the registry, open the inputs, lay out the output, resolve parameters.

    ``places``: where the names of models lead that are neither paths nor on the hub. ``earlier``: the merge that
    those of the recipe are added to.
    """
    method = get(recipe.method)
    problems = [*not_yet(recipe), *check_settings(recipe, method), *_counts(recipe, method)]
    in_parts = parts_problems(method, "task" in recipe.parameters) if recipe.in_parts else []
    problems += check_lines(recipe)
    UsageError.gather([*problems, *in_parts, *_idle_statistics(recipe, method)])
    method = with_lines(recipe, method)
    UsageError.gather(_counts(recipe, method))
    inputs = Inputs(recipe, places, raw=options.raw, allow_pickle=options.allow_pickle)
    try:
        return _planned(recipe, method, options, inputs, earlier)
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


def _planned(recipe: Recipe, method: Method, options: Options, inputs: Inputs, earlier: Earlier | None) -> Plan:
    inputs.refuse_quantised()
    _widen(inputs, options)
    chart = layout(recipe, inputs, method, options.on_extra)
    tokens, alignment = _tokens(recipe, inputs, chart, options)
    chart = replace(chart, pieces=alignment.pieces) if alignment is not None else chart
    seed = options.seed if options.seed is not None else (recipe.seed or 0)
    layers = {stack.prefix: len(layer_map) for stack, layer_map in chart.depths}
    maker = OutputMaker(recipe, method, inputs, seed, layers)
    outputs = maker.outputs(chart.pieces)
    merged = [output.tensor for output in outputs if output.tensor is not None]
    _check_values(method, merged)
    names = [source.name for output in outputs for source in output.piece.sources]
    filters = unmatched_filters(recipe, names, [output.name for output in outputs])
    if options.strict:
        UsageError.gather(filters)
    notices = [*recipe.notices, *inputs.notices(), *chart.notices, *filters]
    if recipe.in_parts:
        outputs = maker.in_parts(outputs, chart.pieces)
    running = None
    if options.save_state:
        from .running import running_state

        running, outputs = running_state(recipe, method, outputs, options, earlier)
    notices += [*tokens.notices, *id_notices(inputs.donor.checkpoint, tokens)] if tokens is not None else []
    notices += alignment.notices if alignment is not None else ()
    as_gguf = recipe.output is not None and recipe.output.format == "gguf"
    lost = inputs.donor.checkpoint.unwritten if tokens is None and not as_gguf else ()
    notices += [f"{inputs.donor.label}: {what}" for what in lost]
    made = Plan(
        recipe, method, maker.resolver.variant, seed, options, inputs, chart, tuple(outputs), notices,
        tokens=None if tokens is None else replace(tokens, known={}), alignment=alignment,
        measured=maker.resolver.measured(), running=running,
    )  # fmt: skip
    if as_gguf:
        from .gguf import gguf_layout, in_gguf

        file = gguf_layout(made)
        made = replace(made, outputs=in_gguf(made.outputs, file), gguf=file, notices=[*notices, *file.notices])
    elif recipe.output is not None and recipe.output.packing is not None:
        from .float8 import float8_layout

        made = replace(made, float8=float8_layout(made))
    UsageError.gather(made.budget.problems())
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


def _widen(inputs: Inputs, options: Options) -> None:
    """A text model that is merged with one that also sees: the result is of the second kind."""
    wider = [item for item in inputs.merged if item is not inputs.donor and contains(item, inputs.donor)]
    if wider and options.on_extra != "drop":
        inputs.donor = wider[0]


def _check_values(method: Method, tensors: Sequence[Tensor]) -> None:
    """Refuse parameters that have no result. Outputs that need no statistics are asked for to find out."""
    if tensors and method.survey is not None and method.passes(dict(tensors[0].shared))[0]:
        UsageError.gather(whole_model_values(method, [(dict(t.shared), dict(t.each)) for t in tensors]))
    method.check_layers(tensors)
    if not isgeneratorfunction(method.merge):
        for tensor in tensors:
            method.merge(tensor)

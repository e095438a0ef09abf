"""A tree of nodes to a :class:`Recipe`: the rules of the language, each mistake reported where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

from ..errors import UsageError, show
from .documents import canonical
from .language import InputModel, ModelReference, OutputModule, OutputOptions, OutputSlice, Recipe
from .nodes import Fields, Items, Leaf, Node, Position, Report
from .references import read_reference
from .sections import Section, scalar_of
from .settings import Condition, Setting, read_settings
from .sizes import parse_size
from .tokens import read_source, read_template, read_tokenizer

KEYS = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "only", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "name", "seed", "scope", "lines", "output",
)  # fmt: skip
FORMATS = ("safetensors", "gguf", "lora", "delta", "routed", "parts")

#: The quantised types that matrices are written as, and the format that has them.
PACKINGS = {"q8_0": "gguf", "fp8_block": "safetensors", "fp8_tensor": "safetensors"}

#: Where the scales of FP8 come from: the values themselves, or the base.
SCALES = ("fresh", "base")

EMPTY = "the document is empty: a recipe has at least merge_method and models"
#: Keys that give away other files of mergekit's.
_FOREIGN = {"experts": "a mixture-of-experts recipe (mergekit-moe)", "genome": "a search recipe (mergekit-evolve)"}
_PARAMETERS_HINT = "; a method's parameters go under parameters"


def read_recipe(node: Node, text: str, report: Report) -> Recipe | None:
    """One document, or None when it is so wrong that no recipe can be made of it."""
    if isinstance(node, Leaf) and node.value is None:
        report.fail(node.position, EMPTY)
        return None
    foreign = next((key for key in _FOREIGN if isinstance(node, Fields) and key in node.nodes), None)
    if foreign:
        report.fail(node.position, f"this is {_FOREIGN[foreign]}, which this version does not read")
        return None
    section = Section(node, KEYS, "a recipe", report, _PARAMETERS_HINT)
    if section.malformed:
        return None
    section.require("merge_method")
    _check_one_form(section)
    _check_one_tokenizer(section)
    source, tokenizer = section.get("tokenizer_source"), section.get("tokenizer")
    recipe = Recipe(
        method=section.text("merge_method") or "",
        models=_models(section),
        slices=_slices(section),
        modules=_modules(section),
        base_model=_model(section, "base_model"),
        parameters=_settings(section),
        lines=_lines(section),
        only=_only(section),
        dtype=section.dtype("dtype"),
        out_dtype=section.dtype("out_dtype"),
        tokenizer_source=read_source(source, report) if source else None,
        tokenizer=read_tokenizer(tokenizer, report) if tokenizer else None,
        chat_template=read_template(section),
        name=section.text("name"),
        seed=section.integer("seed"),
        scope=section.word("scope", ("tensor", "model")),
        output=_output(section),
        text=text,
        origin=node.position.origin,
        where={key: section.keys[key] for key in section.nodes},
    )
    _check_layers(recipe, report)
    return recipe


def _check_one_form(section: Section) -> None:
    given = [key for key in ("models", "slices", "modules") if _filled(section.get(key))]
    if len(given) > 1:
        section.fail(given[1], f"exactly one of models, slices and modules may be given, found {' and '.join(given)}")
    elif not given:
        section.fail("models", "a recipe needs one of models, slices and modules, with something in it")


def _filled(node: Node | None) -> bool:
    """Anything but an absent or empty list or mapping (a wrong type is reported where it is read)."""
    return bool(node.nodes) if isinstance(node, Items | Fields) else node is not None


def _check_one_tokenizer(section: Section) -> None:
    if section.get("tokenizer") and section.get("tokenizer_source"):
        section.fail("tokenizer_source", "tokenizer_source is the older form of tokenizer.source: give only one")


def _settings(section: Section) -> Mapping[str, Setting]:
    node = section.get("parameters")
    return read_settings(node, section.report) if node else {}


def _lines(section: Section) -> Mapping[str, Setting] | None:
    """Settings of one value each."""
    node = section.get("lines")
    if node is None:
        return None
    found = read_settings(node, section.report, "lines")
    for name, setting in found.items():
        if len(list(setting.values())) != 1 or any(setting.filters()):
            section.report.fail(setting.position, f"lines: {name} must be a single value")
    return found


def _only(section: Section) -> tuple[Condition, ...]:
    """One filter, or a list of them."""
    node = section.get("only")
    nodes = node.nodes if isinstance(node, Items) else (node,) if node else ()
    if isinstance(node, Items) and not nodes:
        section.fail("only", "only is empty: name at least one filter, or leave it out")
    return tuple(Condition((), text, child.position) for child in nodes if (text := _filter(child, section)))


def _filter(node: Node, section: Section) -> str | None:
    if isinstance(node, Leaf) and isinstance(node.value, str) and node.value:
        return node.value
    section.wrong(node, f"only takes filters (parts of tensor names), found {node} (quote it to make it text)")
    return None


# --- models ---------------------------------------------------------------------------------------------


def _model(section: Section, key: str) -> ModelReference | None:
    node = section.get(key)
    return _inline_or_reference(node, section.report, key) if node else None


def _inline_or_reference(node: Node, report: Report, key: str) -> ModelReference | None:
    """Where a model goes, a whole recipe may go."""
    if not isinstance(node, Fields) or "merge_method" not in node.nodes:
        return read_reference(node, report, key)
    text = canonical([node])
    recipe = read_recipe(node, text, report)
    name = f"{recipe.method}-{sha256(text.encode()).hexdigest()[:12]}" if recipe else ""
    return ModelReference(name, name, node.position, recipe=recipe) if recipe else None


def _models(section: Section, key: str = "models") -> tuple[InputModel, ...] | None:
    read = [_input(node, section.report, ()) for node in section.items(key)]
    models = tuple(model for model in read if model)
    _check_distinct(models, section.report)
    return models or None


def _input(node: Node, report: Report, more: tuple[str, ...]) -> InputModel | None:
    """A member of ``models``, or of ``sources`` with ``more`` keys."""
    what, hint = "a source" if more else "an input model", _PARAMETERS_HINT
    if not more and isinstance(node, Fields) and "layer_range" in node.nodes:
        hint = "; layer_range belongs to the sources of slices" + hint
    section = Section(node, ("model", "parameters", "statistics", *more), what, report, hint)
    section.require("model")
    model, parameters = _model(section, "model"), _settings(section)
    layer_range = _layer_range(section) if more else None
    beside = section.get("statistics")
    statistics = read_reference(beside, report, "statistics") if beside else None
    return InputModel(model, parameters, node.position, layer_range, statistics) if model else None


def _check_distinct(models: tuple[InputModel, ...], report: Report) -> None:
    first: dict[ModelReference, Position] = {}
    for given in models:
        if given.model in first:
            place = given.model.position
            report.fail(place, f"{show(given.model.text)} is listed twice (first at {first[given.model]})")
        first.setdefault(given.model, given.model.position)


# --- slices ---------------------------------------------------------------------------------------------


def _slices(section: Section) -> tuple[OutputSlice, ...] | None:
    read = [_slice(node, section.report) for node in section.items("slices")]
    return tuple(piece for piece in read if piece) or None


def _slice(node: Node, report: Report) -> OutputSlice | None:
    known = ("sources", "base_model", "parameters", "residual_weight")
    section = Section(node, known, "a slice", report)
    section.require("sources")
    nodes = section.items("sources")
    if "sources" in section.nodes and not nodes:
        section.fail("sources", "a slice needs at least one source")
    read = [_input(child, report, ("layer_range",)) for child in nodes]
    sources = tuple(source for source in read if source)
    _check_distinct(sources, report)
    _check_equal_lengths(sources, section)
    parameters, base = _settings(section), _model(section, "base_model")
    residual = section.number("residual_weight")
    return OutputSlice(sources, parameters, node.position, base, residual) if sources else None


def _layer_range(section: Section) -> tuple[int, int] | None:
    """[first, last), checked as far as it can be without the model."""
    section.require("layer_range")
    node = section.get("layer_range")
    if node is None:
        return None
    try:
        first, last = _bounds(node)
    except ValueError as error:
        section.wrong(node, str(error))
        return None
    if first < 0 or last < first:
        wrong = "is negative" if first < 0 or last < 0 else "runs backwards"
        section.wrong(node, f"layer_range [{first}, {last}] {wrong}: [first, last) counts from 0")
        return None
    if first == last:
        section.report.note(node.position, f"layer_range [{first}, {last}] is empty: the end is exclusive")
    return first, last


def _bounds(node: Node) -> tuple[int, int]:
    if not isinstance(node, Items) or len(node.nodes) != 2:
        found = f"a list of {len(node.nodes)}" if isinstance(node, Items) else str(node)
        raise ValueError(f"layer_range must be a list of two integers [first, last), found {found}")
    first, last = (int(scalar_of(child, "int")) for child in node.nodes)
    return first, last


def _check_equal_lengths(sources: tuple[InputModel, ...], section: Section) -> None:
    ranged = [source for source in sources if source.layer_range]
    lengths = [source.layers for source in ranged]
    if len(ranged) == len(sources) and len(set(lengths)) > 1:
        spelt = ", ".join(map(str, lengths))
        stacked = ", ".join(f"{{sources: [{{model: {_spelt(s)}, layer_range: {_span(s)}}}]}}" for s in sources)
        section.fail(
            "sources",
            f"the sources of one slice must have equally many layers, found {spelt}; did you mean {len(lengths)} "
            f"slices of one source each? That is: slices: [{stacked}]",
        )


def _spelt(source: InputModel) -> str:
    return source.model.text if source.model.recipe is None else "{...}"


def _span(source: InputModel) -> str:
    first, last = source.layer_range or (0, 0)
    return f"[{first}, {last}]"


def _check_layers(recipe: Recipe, report: Report) -> None:
    """A stack of nothing but empty slices has no layers."""
    stacks = {
        "slices": recipe.slices,
        **{name: module.slices for name, module in (recipe.modules or {}).items()},
    }
    for key, slices in stacks.items():
        ranged = slices and all(source.layer_range for piece in slices for source in piece.sources)
        if slices and ranged and not any(piece.layers for piece in slices):
            report.fail(
                recipe.where.get(key, slices[0].position),
                "every layer_range is empty: no layer would be left",
            )


# --- modules, output ------------------------------------------------------------------------------------


def _modules(section: Section) -> Mapping[str, OutputModule] | None:
    node = section.get("modules")
    if node is None:
        return None
    if not isinstance(node, Fields):
        section.fail("modules", f"modules must be a mapping name: module, found {node}")
        return None
    return {name: _module(child, section.report) for name, child in node.nodes.items()} or None


def _module(node: Node, report: Report) -> OutputModule:
    section = Section(node, ("slices", "models", "parameters"), "a module", report)
    given = [key for key in ("models", "slices") if _filled(section.get(key))]
    if len(given) != 1 and not section.malformed:
        section.fail(
            "slices",
            f"a module needs exactly one of models and slices, found {' and '.join(given) or 'none'}",
        )
    return OutputModule(_slices(section), _models(section), _settings(section), node.position)


def _output(section: Section) -> OutputOptions | None:
    node = section.get("output")
    if node is None:
        return None
    inner = Section(node, ("dtype", "shard_size", "format", "scales"), "output", section.report)
    if inner.get("dtype") and section.get("out_dtype"):
        inner.fail("dtype", "output.dtype says the same as out_dtype: give only one")
    form = inner.word("format", FORMATS) or "safetensors"
    if form == "gguf" and inner.get("shard_size"):
        inner.fail("shard_size", "a GGUF file is written whole: leave shard_size out")
    packing = _packing(inner, form)
    scales = inner.word("scales", SCALES)
    if scales and (packing is None or form == "gguf"):
        inner.fail("scales", "scales are of the dtypes fp8_block and fp8_tensor: say which, or leave scales out")
    return OutputOptions(None if packing else inner.dtype("dtype"), _shard_size(inner), form, packing, scales)


def _packing(section: Section, form: str) -> str | None:
    """The quantised type, where ``dtype`` names one."""
    node = section.get("dtype")
    word = node.value if isinstance(node, Leaf) else None
    if not isinstance(word, str) or word.lower() not in PACKINGS:
        return None
    wanted = PACKINGS[word.lower()]
    if form != wanted:
        section.fail("dtype", f"{word} is a type of {wanted}: say format: {wanted} too")
    return word.upper()


def _shard_size(section: Section) -> int | None:
    node = section.get("shard_size")
    if node is None:
        return None
    try:
        return parse_size(node.text if isinstance(node, Leaf) else str(node))
    except UsageError as error:
        section.wrong(node, f"shard_size: {error}")
        return None

"""The recipe language: what is read, what is not executed yet, and that text and dict say the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from smelt.errors import UsageError
from smelt.recipe import (
    AdapterReference,
    ModelReference,
    Recipe,
    TokenRow,
    did_you_mean,
    in_order,
    not_yet,
    parse,
    parse_mapping,
)  # fmt: skip

PLAIN = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}


def recipe_of(text: str) -> Recipe:
    (recipe,) = parse(text, "r.yml")
    return recipe


def reference(node: Any) -> ModelReference:
    """The reference that ``node`` in the place of a model stands for."""
    (recipe,) = parse_mapping({"merge_method": "linear", "models": [{"model": node}]})
    assert recipe.models
    return recipe.models[0].model


HEAD = "merge_method: linear\n"
MODELS = HEAD + "models: [{model: a}, {model: b}]\n"
SOURCE = HEAD + "slices:\n- sources:\n"


# --- what is read ---------------------------------------------------------------------------------------


def test_everything_at_once() -> None:
    recipe = recipe_of("""\
merge_method: ties
slices:
  - sources:
      - {model: a@v1, layer_range: [0, 2], parameters: {weight: 0.5}}
      - {model: b, layer_range: ["2", 4], statistics: b-fisher}
    base_model: c
    residual_weight: 0.5
  - sources: [{model: a@v1, layer_range: [1, 1]}, {model: b, layer_range: [3, 3]}]
    parameters: {density: [0, 1]}
base_model: d
parameters: {t: 1}
dtype: torch.float32
tokenizer:
  source: union
  tokens:
    x: {source: b, force: yes}
    y: {source: {kind: zero}}
    z: {source: {kind: model_token, model: a, token_id: 3}}
  pad_to_multiple_of: 64
chat_template: auto
name: all
seed: 7
scope: model
output: {dtype: bfloat16, shard_size: 2GB, format: delta}
""")
    assert recipe.slices
    first, second = recipe.slices
    assert [source.layer_range for source in first.sources] == [(0, 2), (2, 4)]
    assert first.sources[0].model.revision == "v1"
    assert first.sources[1].statistics == reference("b-fisher")
    assert (first.base_model, first.residual_weight, first.layers) == (reference("c"), 0.5, 2)
    assert second.layers == 0
    assert (recipe.method, recipe.name, recipe.seed, recipe.scope) == ("ties", "all", 7, "model")
    assert (recipe.dtype, recipe.out_dtype, recipe.written_dtype) == ("F32", None, "BF16")
    assert recipe.output
    assert (recipe.output.shard_size, recipe.output.format) == (2 * 10**9, "delta")
    assert recipe.tokenizer
    assert recipe.tokenizer.pad_to_multiple_of == 64
    assert recipe.tokenizer.tokens["x"].source == reference("b")
    assert recipe.tokenizer.tokens["x"].force
    assert recipe.tokenizer.tokens["y"].source == "zero"
    assert recipe.tokenizer.tokens["z"].source == TokenRow(reference("a"), None, 3)
    assert recipe.chat_template == "auto"
    assert recipe.models is None
    assert recipe.modules is None
    assert [(s.where, s.name, s.level) for s in recipe.all_settings()] == [
        ("slices[0].sources[0]", "weight", "source"),
        ("slices[1]", "density", "slice"),
        ("", "t", "recipe"),
    ]
    assert [r.text for r in recipe.references()] == ["a@v1", "b", "a@v1", "b", "c", "d"]
    assert [note.partition(": ")[0] for note in recipe.notices] == ["r.yml:8:42", "r.yml:8:75"]


def test_modules() -> None:
    recipe = recipe_of("""\
merge_method: linear
modules:
  encoder: {models: [{model: a}, {model: b, parameters: {weight: 1}}], parameters: {weight: 2}}
  decoder: {slices: [{sources: [{model: a, layer_range: [0, 2]}], parameters: {weight: 3}}]}
""")
    assert [(s.where, s.level) for s in recipe.all_settings()] == [
        ("modules.encoder.models[1]", "source"), ("modules.decoder.slices[0]", "slice"), ("modules.encoder", "module"),
    ]  # fmt: skip
    assert [where for where, _ in recipe.inputs()] == [
        "modules.encoder.models[0]", "modules.encoder.models[1]", "modules.decoder.slices[0].sources[0]",
    ]  # fmt: skip


def test_places_of_keys_and_settings() -> None:
    recipe = recipe_of(MODELS + "parameters:\n  weight: [0.5,\n    1]\n")
    assert str(recipe.position("models")) == "line 2, column 1"
    assert str(recipe.position("seed")) == "line 1, column 1"
    setting = recipe.parameters["weight"]
    assert str(setting.position) == "line 4, column 11"
    assert [str(value.position) for value in setting.values()] == ["line 4, column 12", "line 5, column 5"]
    assert setting.position.report("wrong") == "r.yml:4:11: wrong"


def test_dtypes() -> None:
    for name, code in {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}.items():
        assert recipe_of(MODELS + f"dtype: {name}").dtype == code
        assert recipe_of(MODELS + f"out_dtype: torch.{name}").written_dtype == code


def test_empty_values_count_as_absent() -> None:
    empty = recipe_of(MODELS + "slices:\nmodules: {}\nbase_model: ~\nparameters:\nseed: null\nchat_template:\n")
    assert empty == recipe_of(MODELS)


def test_aliases_and_merge_keys() -> None:
    recipe = recipe_of("""\
merge_method: linear
models:
  - &first {model: a, parameters: &p {weight: 1, density: 1}}
  - {model: b, parameters: {<<: *p, weight: 2}}
  - {<<: [{parameters: {x: 1}}, *first], model: c}
""")
    assert recipe.models
    plain = [{name: setting.resolve(0, "") for name, setting in given.parameters.items()} for given in recipe.models]
    assert plain == [{"weight": 1, "density": 1}, {"weight": 2, "density": 1}, {"x": 1}]


def test_json_is_read() -> None:
    assert recipe_of(json.dumps(PLAIN)) == parse_mapping(PLAIN)[0]


def test_windows_line_ends_and_byte_order_mark() -> None:
    assert recipe_of("\ufeff" + MODELS.replace("\n", "\r\n")) == recipe_of(MODELS)


def test_dates_and_odd_words_are_text() -> None:
    assert recipe_of(MODELS + "name: 2024-01-01").name == "2024-01-01"
    assert recipe_of(MODELS + "name: =").name == "="


def test_the_text_is_kept_as_it_was_written() -> None:
    first = "# a comment\nname: x\n" + MODELS + "# the end\n"
    second = "--- # more\n" + MODELS + "\n"
    assert [recipe.text for recipe in parse(first + second)] == [first, second]
    assert [recipe.text for recipe in parse(first)] == [first]
    wide = "# \U0001f600 é\n" + first
    assert [recipe.text for recipe in parse(wide + second)] == [wide, second]
    (from_dict,) = parse_mapping(PLAIN)
    assert parse(from_dict.text) == [from_dict]


# --- references -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "path", "revision", "lora", "lora_revision"),
    [
        ("org/name", "org/name", None, None, None),
        ("org/name@main", "org/name", "main", None, None),
        ("a+b", "a", None, "b", None),
        ("a@x+b@y", "a", "x", "b", "y"),
        ("./models/a", "./models/a", None, None, None),
        ({"model": "a@x"}, "a", "x", None, None),
        ({"model": {"path": "/data/a+b@c"}}, "/data/a+b@c", None, None, None),
        ({"model": {"path": "a", "revision": "x"}, "lora": "b@y"}, "a", "x", "b", "y"),
        ({"model": "a", "lora": {"path": "b@b", "revision": "y"}}, "a", None, "b@b", "y"),
    ],
)
def test_references(node: Any, path: str, revision: str | None, lora: str | None, lora_revision: str | None) -> None:
    found = reference(node)
    assert (found.path, found.revision) == (path, revision)
    assert found.adapters == ((AdapterReference(lora, lora_revision),) if lora else ())


def test_several_adapters_with_weights() -> None:
    found = reference({"model": "a", "lora": ["b@x", {"path": "c", "weight": -0.5}]})
    assert found.adapters == (AdapterReference("b", "x"), AdapterReference("c", None, -0.5))
    assert reference(json.loads(found.text)) == found
    assert reference({"model": "a", "lora": [{"path": "b", "weight": 1}]}) == reference("a+b")


parts = st.text(st.sampled_from("ab/.+@"), min_size=1, max_size=6)
reference_nodes = st.fixed_dictionaries(
    {"model": st.fixed_dictionaries({"path": parts}, optional={"revision": parts})},
    optional={"lora": st.fixed_dictionaries({"path": parts}, optional={"revision": parts, "weight": st.just(0.5)})},
)


@given(reference_nodes, reference_nodes)
def test_references_are_equal_exactly_when_they_mean_the_same(one: Any, other: Any) -> None:
    assert (reference(one) == reference(other)) is (one == other)
    assert (reference(one).text == reference(other).text) is (one == other)


@given(reference_nodes)
def test_the_text_of_a_reference_reads_back(node: Any) -> None:
    found = reference(node)
    assert reference(yaml.safe_load(found.text) if found.text.startswith("{") else found.text) == found


def test_an_inline_recipe_may_stand_for_a_model() -> None:
    outer = recipe_of(
        HEAD + "models: [{model: {merge_method: slerp, models: [{model: x}], base_model: y}}, {model: z}]\n"
    )
    assert outer.models
    inner = outer.models[0].model.recipe
    assert inner
    assert inner.method == "slerp"
    assert [stage.recipe for stage in in_order([outer])] == [inner, outer]
    assert in_order([outer])[0].name == outer.models[0].model.path


# --- what is not executed yet ---------------------------------------------------------------------------

LATER = [
    ("statistics", HEAD + "models: [{model: a, statistics: s+b}]\n", "2:33: an adapter on statistics "),
    ("residual", SOURCE + "  - {model: a, layer_range: [0, 1]}\n  residual_weight: 1\n", "3:3: residual_weight "),
    ("format", MODELS + "output: {format: lora}\n", "3:1: the output format lora "),
    (
        "architecture",
        HEAD + "models: [{model: {model: a, override_architecture: B}}]\n",
        "2:18: override_architecture ",
    ),
]


@pytest.mark.parametrize(("text", "start"), [case[1:] for case in LATER], ids=[case[0] for case in LATER])
def test_what_is_understood_but_not_executed_is_said(text: str, start: str) -> None:
    (line,) = not_yet(recipe_of(text))
    assert line == f"r.yml:{start}is understood but not executed by this version"


def test_ordinary_recipes_are_executed() -> None:
    assert not_yet(recipe_of(MODELS + "seed: 1\nscope: tensor\noutput: {shard_size: 1GB, dtype: float16}\n")) == []


def several(*documents: str) -> list[str]:
    """The names of the stages of documents like "x: a b" (x needs a and b; no name before the colon: the output)."""
    texts = []
    for document in documents:
        name, _, needed = document.partition(":")
        models = ", ".join(f"{{model: {each}}}" for each in needed.split())
        texts.append((f"name: {name}\n" if name else "") + HEAD + f"models: [{models}]\n")
    return [stage.name for stage in in_order(parse("---\n".join(texts), "r.yml"))]


def test_stages_come_before_those_that_take_them() -> None:
    assert several(":c a", "c:b", "b:a", "a:m") == ["a", "b", "c", ""]
    assert several("a:m", "b:a") == ["a", "b"]
    assert several("a:m") == ["a"]


def test_documents_that_nobody_takes_are_left_out_and_said() -> None:
    recipes = parse(f"name: x\n{MODELS}---\nname: y\n{MODELS}---\n{MODELS}")
    (stage,) = in_order(recipes)
    assert [notice.partition(": ")[2] for notice in stage.recipe.notices] == [
        "the document 'x' is used by no other: it is not run", "the document 'y' is used by no other: it is not run"
    ]  # fmt: skip
    assert stage.recipe.text == "".join(recipe.text for recipe in recipes)


def test_a_revision_means_the_hub_and_no_stage() -> None:
    assert several("a:m", ":a@main b") == [""]


# --- laws -----------------------------------------------------------------------------------------------

words = st.sampled_from(["a", "b", "org/model", "path/with space", "ünïcode", "yes", "12", "null", "x: y", "# x"])
references = words | words.map(lambda word: {"model": {"path": word}}) | st.just("a@main")
finite = st.integers(-(10**15), 10**15) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
gradients = st.lists(finite, max_size=4)
condition = st.fixed_dictionaries({"value": finite | gradients}, optional={"filter": words | st.none()})
settings = finite | gradients | condition | st.lists(condition, min_size=1, max_size=3)
parameters = st.dictionaries(st.sampled_from(["weight", "density", "t", "lambda"]), settings, max_size=3)


def models(keys: dict[str, Any]) -> st.SearchStrategy[list[Any]]:
    entry = st.fixed_dictionaries({"model": references, **keys}, optional={"parameters": parameters})
    return st.lists(entry, min_size=1, max_size=3, unique_by=lambda given: reference(given["model"]).text)


slices = st.tuples(st.integers(0, 50), st.integers(1, 30)).flatmap(
    lambda span: st.fixed_dictionaries(
        {"sources": models({"layer_range": st.just([span[0], sum(span)])})}, optional={"parameters": parameters}
    )
)
forms = (
    models({}).map(lambda value: {"models": value})
    | st.lists(slices, min_size=1, max_size=3).map(lambda value: {"slices": value})
    | models({}).map(lambda value: {"modules": {"encoder": {"models": value}}})
)
recipes = st.builds(
    lambda form, rest: {**form, **rest},
    forms,
    st.fixed_dictionaries(
        {"merge_method": st.sampled_from(["linear", "ties"])},
        optional={
            "base_model": references,
            "parameters": parameters,
            "dtype": st.sampled_from(["float32", "torch.bfloat16"]),
            "seed": st.integers(0, 2**64),
            "scope": st.sampled_from(["tensor", "model"]),
            "tokenizer_source": st.sampled_from(["union", "base"]),
            "output": st.fixed_dictionaries({}, optional={"shard_size": st.integers(1, 10**12)}),
        },
    ),
)


@given(recipes, st.booleans())
def test_text_and_dict_say_the_same(recipe: dict[str, Any], flow: bool) -> None:
    text = yaml.safe_dump(recipe, default_flow_style=flow, allow_unicode=True)
    (from_text,), (from_dict,) = parse(text), parse_mapping(recipe)
    assert from_text == from_dict
    assert parse(from_dict.text) == [from_dict]
    assert from_text.text == text


@given(recipes)
def test_the_order_of_keys_does_not_matter(recipe: dict[str, Any]) -> None:
    backwards = dict(reversed(recipe.items()))
    assert parse_mapping(backwards) == parse_mapping(recipe)


@given(st.text(max_size=200) | st.text(st.sampled_from("[]{}:,-&*!|>'\" \nab<"), max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        complete = all(recipe.method for recipe in parse(text))
    except UsageError as error:
        complete = all(line.startswith("<recipe>:") for line in error.problems)
    assert complete


@pytest.mark.parametrize(
    ("word", "end"),
    [
        ("tise", "; did you mean 'ties'?"), ("dare-ties", "; did you mean 'dare_ties'?"),
        ("TIES", "; did you mean 'ties'?"), ("xyz", ""),
    ],
)  # fmt: skip
def test_did_you_mean(word: str, end: str) -> None:
    assert did_you_mean(word, ["linear", "ties", "dare_ties"]) == end

"""The recipe language: what is read, what is refused and where, and that text and dict say the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from smelt.errors import UsageError
from smelt.recipe import (
    ModelReference,
    Position,
    Recipe,
    TokenRow,
    did_you_mean,
    not_yet,
    parse,
    parse_mapping,
    parse_reference,
    single,
)  # fmt: skip

PLAIN = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}


def problems(text: str) -> tuple[str, ...]:
    """Every line of the error that ``text`` raises."""
    with pytest.raises(UsageError) as caught:
        parse(text, "r.yml")
    return caught.value.problems


def recipe_of(text: str) -> Recipe:
    return single(parse(text, "r.yml"))


def reference(node: Any) -> ModelReference:
    """The reference that ``node`` in the place of a model stands for."""
    (recipe,) = parse_mapping({"merge_method": "linear", "models": [{"model": node}]})
    assert recipe.models
    return recipe.models[0].model


# --- what is refused ------------------------------------------------------------------------------------

HEAD = "merge_method: linear\n"
MODELS = HEAD + "models: [{model: a}, {model: b}]\n"
SOURCE = HEAD + "slices:\n- sources:\n"

#: (what is wrong, text, the only problem: a regular expression with line and column).
BAD: list[tuple[str, str, str]] = [
    # text that is not a recipe at all
    ("tag", MODELS + "name: !!python/object/apply:os.system [ls]\n", r"3:7: the tag '!!python/object/apply:os.system'"),
    ("own tag", MODELS + "name: !x y\n", r"3:7: the tag '!x' is not allowed"),
    ("syntax", MODELS + "name: [1, 2\n", r"4:1: not valid YAML: .*expected ',' or ']'"),
    ("control character", "merge_method: \x01", r"1:1: not valid YAML: control characters are not allowed"),
    ("surrogate", "merge_method: \ud800", r"1:1: a recipe must be valid UTF-8"),
    ("unknown alias", MODELS + "name: *x\n", r"3:7: not valid YAML: found undefined alias"),
    ("empty", "", r"1:1: the document is empty"),
    ("only a comment", "# nothing\n", r"1:1: the document is empty"),
    ("list", "- a\n", r"1:1: a recipe must be a mapping, found a list"),
    ("word", "linear\n", r"1:1: a recipe must be a mapping, found the text 'linear'"),
    ("mergekit-moe", "base_model: a\nexperts: []\n", r"1:1: this is a mixture-of-experts recipe \(mergekit-moe\)"),
    ("mergekit-evolve", "genome: {}\n", r"1:1: this is a search recipe"),
    # keys
    (
        "key twice",
        MODELS + "dtype: float16\ndtype: float32\n",
        r"4:1: the key 'dtype' is given twice \(first in line 3",
    ),
    ("key twice, nested", HEAD + "models: [{model: a, model: b}]", r"2:21: the key 'model' is given twice"),
    (
        "unknown key",
        MODELS + "paramters: {}\n",
        r"3:1: unknown key 'paramters' in a recipe; did you mean 'parameters'\?",
    ),
    ("no such key", MODELS + "normalise: true\n", r"3:1: unknown key 'normalise' .*go under parameters"),
    ("boolean key", MODELS + "on: 1\n", r"3:1: unknown key 'on'"),
    ("key that is a list", MODELS + "? [a]\n: b\n", r"3:3: a key must be a word"),
    ("unknown in a model", HEAD + "models: [{modle: a, model: b}]", r"2:11: unknown key 'modle' .* mean 'model'"),
    ("parameter beside a model", HEAD + "models: [{model: b, weight: 1}]", r"2:21: .*a method's parameters go under"),
    (
        "range in models",
        HEAD + "models: [{model: b, layer_range: [0, 1]}]",
        r"2:21: .*belongs to the sources of slices",
    ),
    ("unknown in a slice", SOURCE + "  - {model: a, layer_range: [0, 1]}\n  source: 1\n", r"5:3: .* mean 'sources'"),
    ("bad merge key", "<<: 3\n" + MODELS, r"1:5: << takes a mapping"),
    # the three forms
    ("no models", HEAD, r"1:1: a recipe needs one of models, slices and modules"),
    ("empty models", HEAD + "models: []\n", r"2:1: a recipe needs one of models"),
    ("no method", "models: [{model: a}]\n", r"1:1: a recipe needs merge_method"),
    ("empty method", "merge_method:\nmodels: [{model: a}]\n", r"1:1: a recipe needs merge_method"),
    ("two forms", MODELS + "modules: {m: {models: [{model: a}]}}\n", r"3:1: exactly one .* found models and modules"),
    ("models as a mapping", HEAD + "models: {a: 1}\n", r"2:9: models must be a list, found a mapping"),
    ("a bare model", HEAD + "models: [a]\n", r"2:10: an input model must be a mapping, found the text 'a'"),
    ("no model", HEAD + "models: [{parameters: {w: 1}}]\n", r"2:10: an input model needs model"),
    (
        "model twice",
        HEAD + "models: [{model: a}, {model: a}]\n",
        r"2:30: 'a' is listed twice \(first at line 2, column",
    ),
    ("modules as a list", HEAD + "modules: [1]\n", r"2:1: modules must be a mapping name: module, found a list"),
    ("empty module", HEAD + "modules: {m: {parameters: {}}}\n", r"2:14: a module needs exactly one .* found none"),
    # references
    ("two pluses", HEAD + "models: [{model: a+b+c}]\n", r"2:18: more than one \+ in 'a\+b\+c'"),
    ("two ats", HEAD + "models: [{model: a@b@c}]\n", r"2:18: more than one @"),
    ("empty adapter", HEAD + "models: [{model: a+}]\n", r"2:18: '' does not name a model"),
    ("empty revision", HEAD + "models: [{model: a@}]\n", r"2:18: 'a@' does not name a model"),
    ("numeric model", HEAD + "models: [{model: 12}]\n", r"2:18: model must name a model, found 12 \(quote it"),
    ("adapter alone", HEAD + "models: [{model: {lora: a}}]\n", r"2:18: a model reference needs model"),
    ("numeric base", MODELS + "base_model: [a]\n", r"3:13: base_model must name a model, found a list"),
    # numbers and other scalars
    ("NaN", MODELS + "parameters: {w: .nan}\n", r"3:17: NaN, infinite and too large numbers .* found .nan"),
    ("infinity", MODELS + "parameters: {w: [0, -.inf]}\n", r"3:21: NaN, infinite"),
    ("overflow", MODELS + "parameters: {w: 1e999}\n", r"3:17: NaN, infinite"),
    ("nothing", MODELS + "parameters: {w: }\n", r"3:17: expected a number, true, false or text, found nothing"),
    ("mixed list", MODELS + "parameters: {w: [1, {value: 2}]}\n", r"3:17: a list holds either plain values"),
    (
        "nested gradient",
        MODELS + "parameters: {w: [[1]]}\n",
        r"3:18: expected a number, true, false or text, found a l",
    ),
    (
        "condition in a condition",
        MODELS + "parameters: {w: {value: {value: 1}}}\n",
        r"3:25: expected .* found a mapping",
    ),
    ("no value", MODELS + "parameters: {w: {filter: mlp}}\n", r"3:17: a condition needs a value"),
    ("unknown in a condition", MODELS + "parameters: {w: {value: 1, fliter: x}}\n", r"3:28: .*mean 'filter'"),
    ("filter yes", MODELS + "parameters: {w: {value: 1, filter: yes}}\n", r"3:36: a filter must be text, found yes"),
    ("parameters as a list", MODELS + "parameters: [1]\n", r"3:13: parameters must be a mapping"),
    ("seed 1.5", MODELS + "seed: 1.5\n", r"3:7: seed must be an integer, found 1.5"),
    ("seed yes", MODELS + "seed: yes\n", r"3:7: seed must be an integer, found yes"),
    ("seed as text", MODELS + "seed: '1'\n", r"3:7: seed must be an integer, found the text '1'"),
    ("seed 1e3", MODELS + "seed: 1e3\n", r"3:7: seed must be an integer"),
    ("a number too long", MODELS + f"seed: {'9' * 5000}\n", r"3:7: '9+\.\.\.' is not a valid int"),
    ("bad explicit bool", MODELS + "seed: !!bool maybe\n", r"3:7: 'maybe' is not a valid bool"),
    ("name no", MODELS + "name: no\n", r"3:7: name must be text, found no \(quote it to make it text\)"),
    (
        "scope",
        MODELS + "scope: tensors\n",
        r"3:8: scope must be tensor or model, found 'tensors'; did you mean 'tensor'",
    ),
    ("dtype fp16", MODELS + "dtype: fp16\n", r"3:8: dtype must be .*, found 'fp16'; write 'float16'"),
    ("dtype half", MODELS + "out_dtype: half\n", r"3:12: out_dtype must be .*; write 'float16'"),
    (
        "dtype int64",
        MODELS + "dtype: int64\n",
        r"3:8: dtype must be float64, float32, float16 or bfloat16, found 'int64'",
    ),
    ("dtype misspelt", MODELS + "dtype: bfloat\n", r"3:8: .*found 'bfloat'; did you mean 'bfloat16'\?"),
    # slices
    ("no sources", HEAD + "slices: [{sources: []}]\n", r"2:11: a slice needs at least one source"),
    ("sources missing", HEAD + "slices: [{parameters: {}}]\n", r"2:10: a slice needs sources"),
    ("no range", SOURCE + "  - model: a\n", r"4:5: a source needs layer_range"),
    ("range of one", SOURCE + "  - {model: a, layer_range: [4]}\n", r"4:29: .*two integers .*found a list of 1"),
    ("range as text", SOURCE + "  - {model: a, layer_range: 0-4}\n", r"4:29: .*found the text '0-4'"),
    (
        "fractional range",
        SOURCE + "  - {model: a, layer_range: [0, 1.5]}\n",
        r"4:29: expected a whole number, found 1.5",
    ),
    ("reversed", SOURCE + "  - {model: a, layer_range: [3, 1]}\n", r"4:29: layer_range \[3, 1\] runs backwards"),
    ("negative", SOURCE + "  - {model: a, layer_range: [-2, 3]}\n", r"4:29: layer_range \[-2, 3\] is negative"),
    ("all empty", SOURCE + "  - {model: a, layer_range: [0, 0]}\n", r"2:1: every layer_range is empty"),
    (
        "unequal lengths",
        SOURCE + "".join(f"  - {{model: m{n}, layer_range: [0, {n}]}}\n" for n in (4, 3, 2)),
        r"3:3: the sources of one slice .* found 4, 3, 2; did you mean 3 slices of one source each\?",
    ),
    (
        "source twice",
        SOURCE + "  - {model: a, layer_range: [0, 2]}\n  - {model: a, layer_range: [2, 4]}\n",
        r"5:13: 'a' is listed twice",
    ),
    # tokenizer, template, output
    ("both tokenizers", MODELS + "tokenizer: {}\ntokenizer_source: base\n", r"4:1: tokenizer_source is the older form"),
    ("padding 0", MODELS + "tokenizer: {pad_to_multiple_of: 0}\n", r"3:33: .*an integer of at least 1, found 0"),
    ("padding 1.5", MODELS + "tokenizer: {pad_to_multiple_of: 1.5}\n", r"3:33: .*an integer of at least 1, found 1.5"),
    ("tokens as a list", MODELS + "tokenizer: {tokens: [x]}\n", r"3:21: tokens must be a mapping token: rule"),
    (
        "token kind",
        MODELS + "tokenizer: {tokens: {x: {source: {kind: zeros}}}}\n",
        r"3:41: kind must be .* mean 'zero'",
    ),
    (
        "token and id",
        MODELS + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a, token: b, token_id: 1}}}}\n",
        r"3:64: kind: model_token takes exactly one of token and token_id",
    ),
    (
        "zero of a model",
        MODELS + "tokenizer: {tokens: {x: {source: {kind: zero, model: a}}}}\n",
        r"3:47: model has no meaning",
    ),
    ("force", MODELS + "tokenizer: {tokens: {x: {force: 2}}}\n", r"3:33: force: expected true or false, found 2"),
    ("template", MODELS + "chat_template: chatlm\n", r"3:1: .*'chatlm'; did you mean 'chatml'\?"),
    ("short template", MODELS + "chat_template: '{{ x }}'\n", r"3:1: chat_template is neither"),
    (
        "two dtypes",
        MODELS + "out_dtype: float16\noutput: {dtype: float32}\n",
        r"4:10: output.dtype says the same as out_dtype",
    ),
    ("shard size", MODELS + "output: {shard_size: many}\n", r"3:22: shard_size: 'many' is not a size"),
    ("format", MODELS + "output: {format: safetensor}\n", r"3:18: format must be .* mean 'safetensors'\?"),
    (
        "residual weight",
        SOURCE + "  - {model: a, layer_range: [0, 1]}\n  residual_weight: x\n",
        r"5:20: residual_weight: expe",
    ),
    # holes
    ("hole in a setting", MODELS + "parameters: {w: {search: [0, 1]}}\n", r"3:17: a hole .* search space"),
    ("hole in a gradient", MODELS + "parameters: {w: [0, {search: [0, 1]}]}\n", r"3:21: a hole"),
    ("hole in a condition", MODELS + "parameters: {w: [{value: {search: [0, 1]}}]}\n", r"3:26: a hole"),
    ("hole for the method", "merge_method: {choice: [ties, linear]}\nmodels: [{model: a}]\n", r"1:15: a hole"),
    ("hole for a model", HEAD + "models: [{model: {choice: [a, b]}}]\n", r"2:18: a hole"),
    ("hole in a range", SOURCE + "  - {model: a, layer_range: [0, {search: [1, 9]}]}\n", r"4:29: a hole"),
    ("hole for the seed", MODELS + "seed: {search: [0, 1]}\n", r"3:7: a hole"),
    # stages
    (
        "refers to itself",
        "name: x\n" + HEAD + "models: [{model: x}, {model: b}]\n",
        r"1:1: the recipe 'x' refers to itself",
    ),
    (
        "circle",
        "name: x\n" + HEAD + "models: [{model: y}]\n---\nname: y\n" + HEAD + "models: [{model: a}]\nbase_model: x\n",
        r"1:1: these recipes need each other: 'x' -> 'y' -> 'x'",
    ),
    ("same names", f"name: x\n{MODELS}---\nname: x\n{MODELS}", r"5:1: two documents are called 'x'"),
    ("two without a name", f"{MODELS}---\n{MODELS}", r"4:1: only one of several documents may go without a name"),
    ("empty document", f"{MODELS}---\n", r"4:1: the document is empty"),
]


@pytest.mark.parametrize(("text", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_mistake_is_refused_with_its_place(text: str, message: str) -> None:
    (found,) = problems(text)
    assert re.match(rf"r\.yml:{message}", found), found
    assert "\n" not in found
    assert found.isprintable()


def test_all_mistakes_are_reported_together_in_order() -> None:
    bad = """\
merge_methd: linear
models:
  - {model: a+b+c, parameters: {weight: .nan}}
  - {model: b, wieght: 1}
dtype: bf16
parameters: {t: {value: [0, {x: 1}], fliter: mlp}}
seed: x
"""
    places = [re.match(r"r\.yml:(\d+):(\d+): ", line) for line in problems(bad)]
    found = [(int(m[1]), int(m[2])) for m in places if m]
    assert found == [(1, 1), (1, 1), (3, 13), (3, 41), (4, 16), (5, 8), (6, 29), (6, 38), (7, 7)]


def test_mistakes_of_all_documents_are_reported_together() -> None:
    assert len(problems(f"{MODELS}seed: x\n---\nname: c\n{MODELS}seed: y\n")) == 2


def test_mistakes_in_a_dict_are_placed_by_key() -> None:
    wrong = {**PLAIN, "models": [{"model": "a", "parameters": {"weight": [1, float("nan")]}}], "sed": 3}
    with pytest.raises(UsageError) as caught:
        parse_mapping(wrong, "recipe")
    nan, unknown = sorted(caught.value.problems)
    assert nan.startswith("recipe: models[0].parameters.weight[1]: NaN")
    assert unknown == "recipe: sed: unknown key 'sed' in a recipe; did you mean 'seed'?"


def test_a_dict_may_hold_paths_and_numbers_but_no_objects() -> None:
    (recipe,) = parse_mapping({**PLAIN, "base_model": Path("folder/base")})
    assert recipe.base_model == parse_reference("folder/base", Position("here"))
    with pytest.raises(UsageError, match="a recipe cannot hold a set"):
        parse_mapping({**PLAIN, "name": {1, 2}})


# --- limits ---------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, r"more than 100000 values"),
        ("<<: [&a {x: 1}" + ", *a" * 120_000 + "]", r"more than 100000 values"),
        ("[" * 65 + "]" * 65, r"1:65: nested more than 64 levels deep"),
        ("[" * 500_000, r"1:65: nested more than 64 levels deep"),
        ("".join(f"{' ' * i}a:\n" for i in range(70)), r"nested more than 64 levels deep"),
        ("models: &m [*m]\n", r"nested more than 64 levels deep"),
        ("&r {<<: *r}\n", r"nested more than 64 levels deep"),
        ("name: " + "x" * 1_000_000, r"1:1: a recipe may have 1000000 bytes"),
    ],
    ids=["laughs", "merge keys", "brackets", "many brackets", "indents", "cycle", "merge cycle", "megabyte"],
)
def test_limits(text: str, message: str) -> None:
    (found,) = problems(text)
    assert re.search(message, found), found


def test_a_dict_that_holds_itself_is_refused() -> None:
    endless: dict[str, Any] = dict(PLAIN)
    endless["parameters"] = {"w": endless}
    with pytest.raises(UsageError, match="nested more than 64 levels"):
        parse_mapping(endless)


def test_the_deepest_allowed_recipe_is_read() -> None:
    node: Any = "a"
    for _ in range(10):
        node = {"merge_method": "linear", "models": [{"model": node}]}
    (recipe,) = parse_mapping(node)
    depth = 0
    while recipe.models and recipe.models[0].model.recipe:
        recipe, depth = recipe.models[0].model.recipe, depth + 1
    assert depth == 9


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
output: {dtype: bfloat16, shard_size: 2GB, format: gguf}
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
    assert (recipe.output.shard_size, recipe.output.format) == (2 * 10**9, "gguf")
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
    assert (found.path, found.revision, found.lora, found.lora_revision) == (path, revision, lora, lora_revision)


parts = st.text(st.sampled_from("ab/.+@"), min_size=1, max_size=6)
reference_nodes = st.fixed_dictionaries(
    {"model": st.fixed_dictionaries({"path": parts}, optional={"revision": parts})},
    optional={"lora": st.fixed_dictionaries({"path": parts}, optional={"revision": parts})},
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
    assert not_yet(outer) == [
        "r.yml:2:18: a recipe in the place of a model is understood but not executed by this version"
    ]
    (problem,) = problems(HEAD + "models: [{model: {merge_method: slerp, models: [{model: x}], base_modle: y}}]\n")
    assert problem.startswith("r.yml:2:62: unknown key 'base_modle'")


# --- what is not executed yet ---------------------------------------------------------------------------

LATER = [
    ("tokenizer", MODELS + "tokenizer: {source: base}\n", "3:1: tokenizer "),
    ("tokenizer_source", MODELS + "tokenizer_source: union\n", "3:1: tokenizer_source "),
    ("chat_template", MODELS + "chat_template: chatml\n", "3:1: chat_template "),
    ("modules", HEAD + "modules: {m: {models: [{model: a}]}}\n", "2:1: modules "),
    ("adapter", HEAD + "models: [{model: a+b}]\n", "2:18: an adapter (the part after +, or lora) "),
    (
        "adapter of the base",
        MODELS + "base_model: {model: a, lora: b}\n",
        "3:13: an adapter (the part after +, or lora) ",
    ),
    ("statistics", HEAD + "models: [{model: a, statistics: s}]\n", "2:33: statistics "),
    ("residual", SOURCE + "  - {model: a, layer_range: [0, 1]}\n  residual_weight: 1\n", "3:3: residual_weight "),
    ("format", MODELS + "output: {format: gguf}\n", "3:1: the output format gguf "),
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


def test_a_single_recipe_is_wanted() -> None:
    several = parse(f"name: x\n{MODELS}---\n{HEAD}models: [{{model: x}}, {{model: b}}]\n", "r.yml")
    with pytest.raises(UsageError, match=r"r\.yml:5:1: the file holds 2 documents"):
        single(several)
    assert single(several[:1]) is several[0]


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

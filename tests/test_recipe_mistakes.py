"""What the recipe language refuses: each mistake with its place, all of them together, within limits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from smelt.errors import UsageError
from smelt.recipe import Position, parse, parse_mapping, parse_reference

PLAIN = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}

HEAD = "merge_method: linear\n"
MODELS = HEAD + "models: [{model: a}, {model: b}]\n"
SOURCE = HEAD + "slices:\n- sources:\n"


def problems(text: str) -> tuple[str, ...]:
    """Every line of the error that ``text`` raises."""
    with pytest.raises(UsageError) as caught:
        parse(text, "r.yml")
    return caught.value.problems


# fmt: off
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
    ("key twice", MODELS + "dtype: float16\ndtype: float32\n",
     r"4:1: the key 'dtype' is given twice \(first in line 3"),
    ("key twice, nested", HEAD + "models: [{model: a, model: b}]", r"2:21: the key 'model' is given twice"),
    ("unknown key", MODELS + "paramters: {}\n",
     r"3:1: unknown key 'paramters' in a recipe; did you mean 'parameters'\?"),
    ("no such key", MODELS + "normalise: true\n", r"3:1: unknown key 'normalise' .*go under parameters"),
    ("boolean key", MODELS + "on: 1\n", r"3:1: unknown key 'on'"),
    ("key that is a list", MODELS + "? [a]\n: b\n", r"3:3: a key must be a word"),
    ("unknown in a model", HEAD + "models: [{modle: a, model: b}]", r"2:11: unknown key 'modle' .* mean 'model'"),
    ("parameter beside a model", HEAD + "models: [{model: b, weight: 1}]", r"2:21: .*a method's parameters go under"),
    ("range in models", HEAD + "models: [{model: b, layer_range: [0, 1]}]",
     r"2:21: .*belongs to the sources of slices"),
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
    ("model twice", HEAD + "models: [{model: a}, {model: a}]\n",
     r"2:30: 'a' is listed twice \(first at line 2, column"),
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
    ("inside an inline recipe",
     HEAD + "models: [{model: {merge_method: slerp, models: [{model: x}], base_modle: y}}]\n",
     r"2:62: unknown key 'base_modle' .* mean 'base_model'"),
    # numbers and other scalars
    ("NaN", MODELS + "parameters: {w: .nan}\n", r"3:17: NaN, infinite and too large numbers .* found .nan"),
    ("infinity", MODELS + "parameters: {w: [0, -.inf]}\n", r"3:21: NaN, infinite"),
    ("overflow", MODELS + "parameters: {w: 1e999}\n", r"3:17: NaN, infinite"),
    ("nothing", MODELS + "parameters: {w: }\n", r"3:17: expected a number, true, false or text, found nothing"),
    ("mixed list", MODELS + "parameters: {w: [1, {value: 2}]}\n", r"3:17: a list holds either plain values"),
    ("nested gradient", MODELS + "parameters: {w: [[1]]}\n",
     r"3:18: expected a number, true, false or text, found a l"),
    ("condition in a condition", MODELS + "parameters: {w: {value: {value: 1}}}\n",
     r"3:25: expected .* found a mapping"),
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
    ("scope", MODELS + "scope: tensors\n",
     r"3:8: scope must be tensor or model, found 'tensors'; did you mean 'tensor'"),
    ("dtype fp16", MODELS + "dtype: fp16\n", r"3:8: dtype must be .*, found 'fp16'; write 'float16'"),
    ("dtype half", MODELS + "out_dtype: half\n", r"3:12: out_dtype must be .*; write 'float16'"),
    ("dtype int64", MODELS + "dtype: int64\n",
     r"3:8: dtype must be float64, float32, float16 or bfloat16, found 'int64'"),
    ("dtype misspelt", MODELS + "dtype: bfloat\n", r"3:8: .*found 'bfloat'; did you mean 'bfloat16'\?"),
    # slices
    ("no sources", HEAD + "slices: [{sources: []}]\n", r"2:11: a slice needs at least one source"),
    ("sources missing", HEAD + "slices: [{parameters: {}}]\n", r"2:10: a slice needs sources"),
    ("no range", SOURCE + "  - model: a\n", r"4:5: a source needs layer_range"),
    ("range of one", SOURCE + "  - {model: a, layer_range: [4]}\n", r"4:29: .*two integers .*found a list of 1"),
    ("range as text", SOURCE + "  - {model: a, layer_range: 0-4}\n", r"4:29: .*found the text '0-4'"),
    ("fractional range", SOURCE + "  - {model: a, layer_range: [0, 1.5]}\n",
     r"4:29: expected a whole number, found 1.5"),
    ("reversed", SOURCE + "  - {model: a, layer_range: [3, 1]}\n", r"4:29: layer_range \[3, 1\] runs backwards"),
    ("negative", SOURCE + "  - {model: a, layer_range: [-2, 3]}\n", r"4:29: layer_range \[-2, 3\] is negative"),
    ("all empty", SOURCE + "  - {model: a, layer_range: [0, 0]}\n", r"2:1: every layer_range is empty"),
    ("unequal lengths", SOURCE + "".join(f"  - {{model: m{n}, layer_range: [0, {n}]}}\n" for n in (4, 3, 2)),
     r"3:3: the sources of one slice .* found 4, 3, 2; did you mean 3 slices of one source each\? "
     r"That is: slices: \[\{sources: \[\{model: m4, layer_range: \[0, 4\]\}\]\}, .*m2, layer_range: \[0, 2\]"),
    ("only of nothing", MODELS + "only: []\n", r"3:1: only is empty: name at least one filter"),
    ("only of a number", MODELS + "only: [mlp, 3]\n", r"3:13: only takes filters .*, found 3 \(quote it"),
    ("source twice", SOURCE + "  - {model: a, layer_range: [0, 2]}\n  - {model: a, layer_range: [2, 4]}\n",
     r"5:13: 'a' is listed twice"),
    # tokenizer, template, output
    ("both tokenizers", MODELS + "tokenizer: {}\ntokenizer_source: base\n", r"4:1: tokenizer_source is the older form"),
    ("padding 0", MODELS + "tokenizer: {pad_to_multiple_of: 0}\n", r"3:33: .*an integer of at least 1, found 0"),
    ("padding 1.5", MODELS + "tokenizer: {pad_to_multiple_of: 1.5}\n", r"3:33: .*an integer of at least 1, found 1.5"),
    ("tokens as a list", MODELS + "tokenizer: {tokens: [x]}\n", r"3:21: tokens must be a mapping token: rule"),
    ("token kind", MODELS + "tokenizer: {tokens: {x: {source: {kind: zeros}}}}\n",
     r"3:41: kind must be .* mean 'zero'"),
    ("token and id",
     MODELS + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a, token: b, token_id: 1}}}}\n",
     r"3:64: kind: model_token takes exactly one of token and token_id"),
    ("padding twice", MODELS + "tokenizer: {padding: keep, pad_to_multiple_of: 8}\n", r"3:13: padding and pad_to"),
    ("force of nothing", MODELS + "tokenizer: {tokens: {x: {force: true}}}\n", r"3:26: force has nothing to put in"),
    ("zero of a model", MODELS + "tokenizer: {tokens: {x: {source: {kind: zero, model: a}}}}\n",
     r"3:47: model has no meaning"),
    ("force", MODELS + "tokenizer: {tokens: {x: {force: 2}}}\n", r"3:33: force: expected true or false, found 2"),
    ("template", MODELS + "chat_template: chatlm\n", r"3:1: .*'chatlm'; did you mean 'chatml'\?"),
    ("short template", MODELS + "chat_template: '{{ x }}'\n", r"3:1: chat_template is neither"),
    ("two dtypes", MODELS + "out_dtype: float16\noutput: {dtype: float32}\n",
     r"4:10: output.dtype says the same as out_dtype"),
    ("shard size", MODELS + "output: {shard_size: many}\n", r"3:22: shard_size: 'many' is not a size"),
    ("format", MODELS + "output: {format: safetensor}\n", r"3:18: format must be .* mean 'safetensors'\?"),
    ("residual weight", SOURCE + "  - {model: a, layer_range: [0, 1]}\n  residual_weight: x\n",
     r"5:20: residual_weight: expe"),
    # holes
    ("hole in a setting", MODELS + "parameters: {w: {search: [0, 1]}}\n", r"3:17: a hole .* search space"),
    ("hole in a gradient", MODELS + "parameters: {w: [0, {search: [0, 1]}]}\n", r"3:21: a hole"),
    ("hole in a condition", MODELS + "parameters: {w: [{value: {search: [0, 1]}}]}\n", r"3:26: a hole"),
    ("hole for the method", "merge_method: {choice: [ties, linear]}\nmodels: [{model: a}]\n", r"1:15: a hole"),
    ("hole for a model", HEAD + "models: [{model: {choice: [a, b]}}]\n", r"2:18: a hole"),
    ("hole in a range", SOURCE + "  - {model: a, layer_range: [0, {search: [1, 9]}]}\n", r"4:29: a hole"),
    ("hole for the seed", MODELS + "seed: {search: [0, 1]}\n", r"3:7: a hole"),
    # stages
    ("refers to itself", "name: x\n" + HEAD + "models: [{model: x}, {model: b}]\n",
     r"1:1: the recipe 'x' refers to itself"),
    ("circle",
     "name: x\n" + HEAD + "models: [{model: y}]\n---\nname: y\n" + HEAD + "models: [{model: a}]\nbase_model: x\n",
     r"1:1: these recipes need each other: 'x' -> 'y' -> 'x'"),
    ("same names", f"name: x\n{MODELS}---\nname: x\n{MODELS}", r"5:1: two documents are called 'x'"),
    ("two without a name", f"{MODELS}---\n{MODELS}", r"4:1: only one of several documents may go without a name"),
    ("empty document", f"{MODELS}---\n", r"4:1: the document is empty"),
]
# fmt: on


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

"""Settings: gradients, filters, conditions, precedence, and what counts as a number or a boolean."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from smelt.errors import UsageError
from smelt.recipe import (
    Recipe,
    Setting,
    convert,
    depth_in_slice,
    levels,
    parse,
    parse_mapping,
    parse_size,
    resolve_parameter,
)  # fmt: skip

NAMES = (
    "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight",
    "model.layers.10.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight",
)  # fmt: skip

numbers = st.integers(-1000, 1000) | st.floats(-1e6, 1e6, allow_nan=False)
positions = st.integers(1, 60).flatmap(
    lambda layers: st.integers(0, layers - 1).map(lambda layer: depth_in_slice(layer, layers))
)
filters = st.sampled_from(["mlp", "self_attn", "layers.1", "embed", "norm", "*", "MLP", "no such", "l.*r"]) | st.none()


def setting(value: Any) -> Setting:
    """The setting that ``value`` stands for."""
    (recipe,) = parse_mapping({"merge_method": "linear", "models": [{"model": "a"}], "parameters": {"p": value}})
    return recipe.parameters["p"]


def conditions(value: st.SearchStrategy[Any]) -> st.SearchStrategy[list[dict[str, Any]]]:
    return st.lists(st.fixed_dictionaries({"value": value}, optional={"filter": filters}), min_size=1, max_size=5)


# --- gradients ------------------------------------------------------------------------------------------


@given(numbers, positions, st.sampled_from(NAMES))
def test_a_scalar_is_the_same_everywhere(value: float, t: float, name: str) -> None:
    assert setting(value).resolve(t, name) == value


@given(st.lists(numbers, min_size=1, max_size=7), positions)
def test_gradients_are_piecewise_linear(values: list[float], t: float) -> None:
    along = Fraction(t) * (len(values) - 1)
    i = min(math.floor(along), len(values) - 2) if len(values) > 1 else 0
    left, right = Fraction(values[i]), Fraction(values[min(i + 1, len(values) - 1)])
    expected = left + (right - left) * (along - i)
    found = setting(values).resolve(t, "any")
    assert math.isclose(float(expected), found, rel_tol=1e-9, abs_tol=1e-6)


@given(st.lists(numbers, min_size=2, max_size=7))
def test_gradients_pass_through_their_values_exactly(values: list[float]) -> None:
    s = setting(values)
    assert s.resolve(0.0, "any") == values[0]
    assert s.resolve(1.0, "any") == values[-1]
    if len(values) == 3:
        assert s.resolve(0.5, "any") == values[1]


@given(st.lists(numbers, min_size=1, max_size=7), positions)
def test_gradients_stay_between_their_values(values: list[float], t: float) -> None:
    written = [entry.value for entry in setting(values).values()]
    slack = 1e-9 * max(1.0, *(abs(value) for value in values))
    assert min(written) - slack <= setting(values).resolve(t, "any") <= max(written) + slack


@given(st.lists(st.booleans() | st.sampled_from(["a", "b", "c"]), min_size=1, max_size=5), positions)
def test_booleans_and_words_step(values: list[bool | str], t: float) -> None:
    expected = values[math.floor(t * (len(values) - 1))]
    found = setting(values).resolve(t, "any")
    assert found == expected
    assert type(found) is type(expected)


def test_one_word_makes_a_gradient_step() -> None:
    assert setting([0.0, 1.0, "a"]).resolve(0.25, "any") == 0.0


def test_a_quoted_number_interpolates_like_a_number() -> None:
    assert setting(["1e-1", 0.3]).resolve(0.5, "any") == pytest.approx(0.2)


def test_integers_stay_exact() -> None:
    large = 2**53 + 1
    assert setting(large).resolve(0.3, "any") == large
    assert setting([large, large]).resolve(1.0, "any") == large


def test_depth_in_slice() -> None:
    assert [depth_in_slice(layer, 4) for layer in range(4)] == [0.0, 1 / 3, 2 / 3, 1.0]
    assert depth_in_slice(0, 1) == 1.0, "a slice of one layer takes a gradient's last value"
    assert depth_in_slice(None, 4) == 0.0, "embeddings and head take the first value"


# --- conditions -----------------------------------------------------------------------------------------


def first_match(entries: list[dict[str, Any]], name: str) -> Any:
    for entry in entries:
        text = entry.get("filter")
        if text is None or text == "*" or text in name:
            return entry["value"]
    return None


@given(conditions(numbers), st.sampled_from(NAMES), positions)
def test_the_first_matching_condition_wins(entries: list[dict[str, Any]], name: str, t: float) -> None:
    assert setting(entries).resolve(t, name) == first_match(entries, name)


@given(conditions(st.lists(numbers, max_size=3)), st.sampled_from(NAMES), positions)
def test_a_condition_may_hold_a_gradient(entries: list[dict[str, Any]], name: str, t: float) -> None:
    chosen = first_match(entries, name)
    expected = setting(chosen).resolve(t, name) if chosen is not None else None
    assert setting(entries).resolve(t, name) == expected


@given(conditions(numbers), conditions(numbers), st.sampled_from(NAMES))
def test_conditions_after_a_match_do_not_matter(before: list[Any], after: list[Any], name: str) -> None:
    value = setting(before).resolve(0.0, name)
    assume(value is not None)
    assert setting(before + after).resolve(0.0, name) == value


def test_a_single_condition_needs_no_list() -> None:
    s = setting({"filter": "mlp", "value": [1, 3]})
    assert s.resolve(0.5, "layers.1.mlp.w") == 2.0
    assert s.resolve(0.5, "layers.1.attn.w") is None


@pytest.mark.parametrize("value", [[], {"value": []}, [{"filter": "x", "value": 1}]])
def test_nothing_that_applies_means_not_set(value: Any) -> None:
    assert setting(value).resolve(0.5, "model.norm.weight") is None


@pytest.mark.parametrize(
    ("text", "name", "matches"),
    [
        ("layers.1", "model.layers.10.mlp.weight", True),
        ("MLP", "model.layers.1.mlp.weight", False),
        ("mlp.*", "model.layers.1.mlp.weight", False),
        ("*", "anything", True),
        ("", "anything", True),
        ("^model", "model.norm", False),
    ],
)
def test_filters_are_plain_substrings(text: str, name: str, matches: bool) -> None:
    found = setting([{"filter": text, "value": 1}]).resolve(0.0, name)
    assert found == (1 if matches else None)


def test_filters_are_listed_with_their_places() -> None:
    text = "merge_method: linear\nmodels: [{model: a}]\nparameters:\n  w:\n  - {filter: mlp, value: 1}\n  - value: 2\n"
    (recipe,) = parse(text)
    ((found, position),) = recipe.parameters["w"].filters()
    assert (found, str(position)) == ("mlp", "line 5, column 14")


def test_words() -> None:
    assert setting(["lm_head", "norm"]).words() == ("lm_head", "norm")
    assert setting("lm_head").words() == ("lm_head",)
    assert setting([]).words() == ()
    for wrong in ([1, 2], {"filter": "mlp", "value": "a"}):
        with pytest.raises(ValueError, match="list of words"):
            setting(wrong).words()


# --- precedence -----------------------------------------------------------------------------------------

LEVELS = ("source", "slice", "module", "recipe")


def recipe_with(weights: dict[str, Any]) -> Recipe:
    """A module with one slice of one source, with ``weight`` set at the given levels."""

    def parameters(level: str) -> dict[str, Any]:
        return {"parameters": {"weight": weights[level]}} if level in weights else {}

    source = {"model": "a", "layer_range": [0, 2], **parameters("source")}
    piece = {"sources": [source], **parameters("slice")}
    module = {"slices": [piece], **parameters("module")}
    (recipe,) = parse_mapping({"merge_method": "linear", "modules": {"m": module}, **parameters("recipe")})
    return recipe


def levels_of(recipe: Recipe, *, per_model: bool = True) -> Any:
    assert recipe.modules
    module = recipe.modules["m"]
    assert module.slices
    piece = module.slices[0]
    return levels(recipe, source=piece.sources[0] if per_model else None, piece=piece, module=module)


@given(st.sets(st.sampled_from(LEVELS)))
def test_the_nearest_level_wins(given_at: set[str]) -> None:
    recipe = recipe_with({level: float(LEVELS.index(level)) for level in given_at})
    asked = levels_of(recipe)
    expected = next((float(i) for i, level in enumerate(LEVELS) if level in given_at), None)
    assert resolve_parameter("weight", asked, tensor_name="x", t=0.0) == expected
    assert resolve_parameter("density", asked, tensor_name="x", t=0.0) is None


@given(st.sets(st.sampled_from(LEVELS)), st.sets(st.sampled_from(LEVELS)))
def test_a_level_without_a_match_lets_the_next_speak(given_at: set[str], silent: set[str]) -> None:
    weights = {
        level: {"filter": "nowhere", "value": 9.0} if level in silent else float(i)
        for i, level in enumerate(LEVELS)
        if level in given_at
    }
    asked = levels_of(recipe_with(weights))
    expected = next((float(i) for i, level in enumerate(LEVELS) if level in given_at - silent), None)
    assert resolve_parameter("weight", asked, tensor_name="x", t=0.0) == expected


def test_a_shared_parameter_does_not_look_into_sources() -> None:
    recipe = recipe_with({"source": 1.0, "recipe": 2.0})
    asked = levels_of(recipe, per_model=False)
    assert resolve_parameter("weight", asked, tensor_name="x", t=0.0) == 2.0


# --- conversion -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (1, "float", 1), ("1e-5", "float", 1e-5), ("1.5", "float", 1.5), ("-.5e3", "float", -500.0),
        (2.0, "int", 2), ("3", "int", 3), ("1e2", "int", 100),
        (True, "bool", True), (1, "bool", True), (0.0, "bool", False), ("yes", "bool", True), ("Off", "bool", False),
        ("x", "str", "x"),
    ],
)  # fmt: skip
def test_conversions(value: Any, kind: str, expected: Any) -> None:
    found = convert(value, kind)
    assert found == expected
    assert isinstance(found, bool) is isinstance(expected, bool)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (True, "float", "expected a number, found true"), ("many", "float", "expected a number, found 'many'"),
        (None, "float", "found nothing"), (math.nan, "float", "finite"), (10**400, "float", "finite"),
        ("nan", "float", "expected a number"), (0.5, "int", "whole number, found 0.5"), (False, "int", "found false"),
        (0.5, "bool", "true or false, found 0.5"), (2, "bool", "true or false"), ("maybe", "bool", "true or false"),
        (None, "bool", "true or false"), (1, "str", "expected text, found 1"), (True, "str", "quote it"),
    ],
)  # fmt: skip
def test_conversions_that_are_refused(value: Any, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(value, kind)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**20), 10**20))
def test_numbers_survive_being_quoted(value: float) -> None:
    quoted = setting(repr(value)).resolve(0.0, "x")
    assert convert(quoted, "float") == value
    assert setting([repr(value), value]).resolve(0.5, "x") == pytest.approx(value)


@pytest.mark.parametrize("text", ["1e-3", "1e5", "2E+6", "1.0e5"])
def test_numbers_that_yaml_reads_as_text_are_numbers_and_said_so(text: str) -> None:
    assert isinstance(yaml.safe_load(text), str)
    source = f"merge_method: linear\nmodels: [{{model: a}}]\nparameters: {{w: {text}}}\n"
    (recipe,) = parse(source, "r.yml")
    assert recipe.parameters["w"].resolve(0.0, "x") == float(text)
    assert recipe.notices == (f"r.yml:3:17: {text} is text in YAML 1.1; read as the number {float(text)!r}",)


@pytest.mark.parametrize(("text", "value"), [("010", 8), ("1:30", 90), ("1_000", 1000), ("0x10", 16)])
def test_numbers_with_a_surprise_are_said(text: str, value: int) -> None:
    source = f"merge_method: linear\nmodels: [{{model: a}}]\nseed: {text}\n"
    (recipe,) = parse(source, "r.yml")
    assert recipe.seed == value
    assert recipe.notices == (f"r.yml:3:7: '{text}' is read as the number {value}, as YAML 1.1 has it",)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), (7, 7), ("512 MiB", 2**29), ("1.5gib", 3 * 2**29), ("10", 10), ("0.5KB", 500)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 parsecs", "1e9", "0.1B", "1" * 30, 1.5])
def test_sizes_that_are_refused(text: Any) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


def test_sizes_grow_with_their_units() -> None:
    sizes = [parse_size(f"1{unit}") for unit in ("B", "KB", "KiB", "MB", "MiB", "GB", "GiB", "TB", "TiB")]
    assert all(small < large for small, large in pairwise(sizes))

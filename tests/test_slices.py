"""Recipes with slices: layers stacked, repeated, dropped and renumbered, and a config that fits the result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.errors import InputRejected, UsageError
from tests.readback import nothing_left, stored, values
from tests.recipes import recipe
from tests.small_models import CONFIG, Arrays, save

LAYERS, WIDTH = 6, 8
PARTS = ("self_attn.o_proj", "mlp.down_proj", "input_layernorm")
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "linear", "other"]
DEEP = {**CONFIG, "num_hidden_layers": LAYERS, "layer_types": KINDS, "eos_token_id": [1, 2, 3, 4, 5, 6],
        "torch_dtype": "float32"}  # fmt: skip
FIRST, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def weight(layer: int, part: str) -> str:
    return f"model.layers.{layer}.{part}.weight"


def deep(seed: int, layers: int = LAYERS) -> Arrays:
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {FIRST: (20, WIDTH), NORM: (WIDTH,), HEAD: (20, WIDTH)}
    for layer in range(layers):
        shapes |= {weight(layer, part): (WIDTH,) if "norm" in part else (WIDTH, WIDTH) for part in PARTS}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


A, B = deep(1), deep(2)


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    return [save(tmp_path / "a", A, config=DEEP), save(tmp_path / "b", B, config=DEEP)]


def sliced(method: str, *slices: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"merge_method": method, "slices": list(slices), **more}


def part(models: Sequence[str], *ranges: tuple[int, int], **more: Any) -> dict[str, Any]:
    """One slice; a single range holds for all models."""
    each = ranges * len(models) if len(ranges) == 1 else ranges
    sources = [{"model": m, "layer_range": list(r)} for m, r in zip(models, each, strict=True)]
    return {"sources": sources, **more}


def config_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())  # type: ignore[no-any-return]


# --- one slice over everything --------------------------------------------------------------------------


def test_the_full_range_is_the_model_itself(pair: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    smelt.merge(sliced("passthrough", part(pair[:1], (0, LAYERS))), out)
    assert stored(out) == stored(Path(pair[0]))
    assert (out / "config.json").read_bytes() == (Path(pair[0]) / "config.json").read_bytes()


@pytest.mark.parametrize(("method", "each"), [("linear", {"weight": 0.5}), ("task_arithmetic", {"weight": 0.3})])
def test_the_full_range_merges_as_models_do(
    method: str, each: dict[str, float], pair: list[str], tmp_path: Path
) -> None:
    base = None if method == "linear" else pair[0]
    whole = recipe(method, pair if base is None else pair[1:], base, each=each)
    slices = sliced(method, part(pair, (0, LAYERS)), parameters=each, **({"base_model": base} if base else {}))
    smelt.merge(whole, tmp_path / "whole", force=True)
    smelt.merge(slices, tmp_path / "slices", force=True)
    assert stored(tmp_path / "whole") == stored(tmp_path / "slices")


# --- stacking -------------------------------------------------------------------------------------------


@pytest.fixture
def stack(pair: list[str], tmp_path: Path) -> Path:
    """Layers 0 to 3 of the first model, then 2 to 5 of the second."""
    out = tmp_path / "out"
    smelt.merge(sliced("passthrough", part(pair[:1], (0, 4)), part(pair[1:], (2, 6))), out)
    return out


def test_layers_are_stacked_and_renumbered(stack: Path) -> None:
    found = values(stack)
    origin = [(A, 0), (A, 1), (A, 2), (A, 3), (B, 2), (B, 3), (B, 4), (B, 5)]
    for layer, (model, source) in enumerate(origin):
        for name in PARTS:
            np.testing.assert_array_equal(found[weight(layer, name)], model[weight(source, name)])
    assert len(found) == 3 + len(PARTS) * len(origin)


def test_what_surrounds_the_layers_comes_from_the_outer_slices(stack: Path) -> None:
    found = values(stack)
    np.testing.assert_array_equal(found[FIRST], A[FIRST])
    np.testing.assert_array_equal(found[NORM], B[NORM])
    np.testing.assert_array_equal(found[HEAD], B[HEAD])


def test_the_config_counts_the_layers_and_lists_them_in_order(stack: Path) -> None:
    changed = {"num_hidden_layers": 8, "layer_types": [*KINDS[0:4], *KINDS[2:6]]}
    assert config_of(stack) == DEEP | changed


def test_layers_can_be_dropped_repeated_and_reordered(pair: list[str], tmp_path: Path) -> None:
    ranges = [(4, 5), (0, 2), (4, 5)]
    smelt.merge(sliced("passthrough", *(part(pair[:1], r) for r in ranges)), tmp_path / "out")
    found = values(tmp_path / "out")
    for layer, source in enumerate([4, 0, 1, 4]):
        np.testing.assert_array_equal(found[weight(layer, PARTS[0])], A[weight(source, PARTS[0])])
    assert config_of(tmp_path / "out")["layer_types"] == [KINDS[i] for i in (4, 0, 1, 4)]


def test_more_than_ten_layers_keep_their_order(pair: list[str], tmp_path: Path) -> None:
    smelt.merge(sliced("passthrough", part(pair[:1], (0, 6)), part(pair[:1], (0, 6))), tmp_path / "out")
    found = values(tmp_path / "out")
    for layer in range(12):
        np.testing.assert_array_equal(found[weight(layer, PARTS[1])], A[weight(layer % 6, PARTS[1])])


def test_sources_of_one_slice_may_lie_at_different_depths(pair: list[str], tmp_path: Path) -> None:
    tree = sliced("linear", part(pair, (0, 2), (3, 5), parameters={"weight": 1.0}))
    smelt.merge(tree, tmp_path / "out")
    found = values(tmp_path / "out")
    for layer in range(2):
        expected = (A[weight(layer, PARTS[0])] + B[weight(layer + 3, PARTS[0])]) / np.float32(2)
        np.testing.assert_array_equal(found[weight(layer, PARTS[0])], expected)


def test_output_projections_can_be_scaled_to_nothing(pair: list[str], tmp_path: Path) -> None:
    """Block expansion: a repeated layer that starts as the identity."""
    scale = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]
    copy = part(pair[:1], (2, 3))
    copy["sources"][0]["parameters"] = {"scale": scale}
    smelt.merge(sliced("passthrough", part(pair[:1], (0, 3)), copy, part(pair[:1], (3, 6))), tmp_path / "out")
    found = values(tmp_path / "out")
    assert not found[weight(3, "self_attn.o_proj")].any()
    assert not found[weight(3, "mlp.down_proj")].any()
    np.testing.assert_array_equal(found[weight(3, "input_layernorm")], A[weight(2, "input_layernorm")])
    np.testing.assert_array_equal(found[weight(2, "self_attn.o_proj")], A[weight(2, "self_attn.o_proj")])


# --- gradients ------------------------------------------------------------------------------------------


def line(t: float, layer: int, source: int) -> Any:
    """Linear interpolation as the kernel computes it."""
    a, b = A[weight(source, PARTS[0])], B[weight(source, PARTS[0])]
    return np.float32(1 - t) * a + np.float32(t) * b


def test_a_gradient_runs_over_each_slice_of_its_own(pair: list[str], tmp_path: Path) -> None:
    """In a slice of one layer it stands at its end; outside the layers at its beginning."""
    slices = [part(pair, r) for r in [(0, 3), (3, 4), (4, 6)]]
    tree = sliced("slerp", *slices, base_model=pair[0], parameters={"t": [0.0, 1.0], "dot_threshold": 0.0})
    smelt.merge(tree, tmp_path / "out")
    found = values(tmp_path / "out")
    for layer, t in enumerate([0.0, 0.5, 1.0, 1.0, 0.0, 1.0]):
        np.testing.assert_array_equal(found[weight(layer, PARTS[0])], line(t, layer, layer))
    np.testing.assert_array_equal(found[FIRST], A[FIRST])
    np.testing.assert_array_equal(found[NORM], A[NORM])


def test_each_slice_may_have_parameters_of_its_own(pair: list[str], tmp_path: Path) -> None:
    slices = [part(pair, (0, 3), parameters={"t": 0.25}), part(pair, (3, 6))]
    tree = sliced("slerp", *slices, base_model=pair[0], parameters={"t": 0.75, "dot_threshold": 0.0})
    smelt.merge(tree, tmp_path / "out")
    found = values(tmp_path / "out")
    for layer in range(LAYERS):
        t = 0.25 if layer < 3 else 0.75
        np.testing.assert_array_equal(found[weight(layer, PARTS[0])], line(t, layer, layer))


def test_a_gradient_over_whole_models_runs_from_end_to_end(pair: list[str], tmp_path: Path) -> None:
    parameters = {"t": [0.0, 0.5, 1.0], "dot_threshold": 0.0}
    smelt.merge(recipe("slerp", pair[1:], pair[0], parameters=parameters), tmp_path / "out", force=True)
    found = values(tmp_path / "out")
    for layer in range(LAYERS):
        np.testing.assert_allclose(found[weight(layer, PARTS[0])], line(layer / 5, layer, layer), rtol=1e-6, atol=1e-6)


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 7)], r"has 6 layers, the range asks for \[0, 7\]"),
        ([(6, 9)], r"has 6 layers, the range asks for \[6, 9\]"),
        ([(3, 1)], "runs backwards"),
        ([(-1, 3)], "is negative"),
        ([(2, 2)], "no layer would be left"),
    ],
)
def test_ranges_outside_the_model_are_refused(
    ranges: list[tuple[int, int]], message: str, pair: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        smelt.merge(sliced("passthrough", *(part(pair[:1], r) for r in ranges)), tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_sources_of_one_slice_are_equally_long(pair: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="layers"):
        smelt.merge(sliced("linear", part(pair, (0, 3), (0, 4)), parameters={"weight": 1}), tmp_path / "out")


@pytest.mark.parametrize("method", ["task_arithmetic", "multislerp"])
def test_the_base_is_among_the_sources(method: str, pair: list[str], tmp_path: Path) -> None:
    tree = sliced(method, part(pair[1:], (0, 6)), base_model=pair[0], parameters={"weight": 1})
    with pytest.raises(UsageError, match="must be among the sources of each slice"):
        smelt.merge(tree, tmp_path / "out")


def test_only_a_stack_of_layers_can_be_sliced(tmp_path: Path) -> None:
    flat = save(tmp_path / "flat", {"w": np.ones((4, 4), np.float32)}, config={})
    with pytest.raises(InputRejected, match="no single stack of layers to slice, found 0"):
        smelt.merge(sliced("passthrough", part([flat], (0, 1))), tmp_path / "out")


def test_models_of_different_depth_are_sent_to_slices(tmp_path: Path) -> None:
    short = save(tmp_path / "short", deep(3, 4), config={**DEEP, "num_hidden_layers": 4, "layer_types": KINDS[:4]})
    long = save(tmp_path / "long", A, config=DEEP)
    with pytest.raises(InputRejected, match=r"short has 4 layers in model\.layers, .*long has 6.*by slices"):
        smelt.merge(recipe("linear", [long, short]), tmp_path / "out")


def test_layers_of_different_shapes_do_not_mix(pair: list[str], tmp_path: Path) -> None:
    wide = {name: np.concatenate([array, array], -1) for name, array in B.items()}
    model = save(tmp_path / "wide", wide, config=DEEP)
    with pytest.raises(InputRejected, match="shapes differ"):
        smelt.merge(sliced("linear", part([pair[0], model], (0, 6)), parameters={"weight": 1}), tmp_path / "out")

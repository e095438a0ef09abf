"""RegMean++: block by block, on numpy arrays and torch modules."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.errors import InputRejected, UsageError

Block = Callable[[Mapping[str, Any], Any], tuple[Any, Mapping[str, Any]]]


def layer(number: int) -> Block:
    def run(tensors: Mapping[str, Any], x: Any) -> tuple[Any, Mapping[str, Any]]:
        name = f"layers.{number}.weight"
        return np.tanh(x @ tensors[name].T + tensors["bias"]), {name: x}

    return run


def network(seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    shapes = {"layers.0.weight": (5, 4), "layers.1.weight": (3, 5)}
    return {**{name: draw.standard_normal(shape) for name, shape in shapes.items()}, "bias": draw.standard_normal(1)}


def batches(seed: int) -> list[Any]:
    draw = np.random.default_rng(seed + 10)
    return [draw.standard_normal((rows, 2, 4)) for rows in (3, 8)]


MODELS, INPUTS, LAYERS = (
    [network(seed) for seed in range(3)],
    [batches(seed) for seed in range(3)],
    [layer(0), layer(1)],
)


def test_each_layer_sees_what_the_merged_ones_below_make() -> None:
    found = smelt.regmean_plus_plus(MODELS, INPUTS, LAYERS, reduce_non_diagonal_ratio=0.7, weights=[1, 2, 1])
    share = np.array([1, 2, 1]) / 4
    bias = sum(s * model["bias"] for s, model in zip(share, MODELS, strict=True))
    assert found["bias"] == pytest.approx(bias)
    rows = [np.concatenate([batch.reshape(-1, 4) for batch in own]) for own in INPUTS]
    for name in ("layers.0.weight", "layers.1.weight"):
        grams = [s * x.T @ x / len(x) for s, x in zip(share, rows, strict=True)]
        grams = [0.7 * gram + 0.3 * np.diag(np.diag(gram)) for gram in grams]
        pull = sum(model[name] @ gram for model, gram in zip(MODELS, grams, strict=True))
        wanted = pull @ np.linalg.inv(sum(grams))
        np.testing.assert_allclose(found[name], wanted, rtol=1e-9)
        rows = [np.tanh(x @ wanted.T + bias) for x in rows]


def test_one_block_of_all_layers_is_regmean() -> None:
    """Inside a block the activations are each model's own."""

    def both(tensors: Mapping[str, Any], x: Any) -> tuple[Any, Mapping[str, Any]]:
        h, first = layer(0)(tensors, x)
        y, second = layer(1)(tensors, h)
        return y, {**first, **second}

    grams = []
    for model, own in zip(MODELS, INPUTS, strict=True):
        seen = [both(model, batch)[1] for batch in own]
        joint = {name: np.concatenate([s[name].reshape(-1, s[name].shape[-1]) for s in seen]) for name in seen[0]}
        grams.append({"gram": {name: x.T @ x / len(x) for name, x in joint.items()}})
    found, wanted = (
        smelt.regmean_plus_plus(MODELS, INPUTS, [both]),
        smelt.merge_tensors("regmean", MODELS, statistics=grams),
    )
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-9)


def test_mistakes_are_told() -> None:
    with pytest.raises(UsageError, match="inputs of 2 models for 3 models"):
        smelt.regmean_plus_plus(MODELS, INPUTS[:2], LAYERS)
    with pytest.raises(UsageError, match=r"the inputs of 'layers\.0\.weight' for some of the models only"):
        smelt.regmean_plus_plus(MODELS, [*INPUTS[:2], []], LAYERS)
    with pytest.raises(InputRejected, match=r"'gram/layers\.0\.weight' is \[5, 5\] for 'layers\.0\.weight' \[5, 4\]"):
        smelt.regmean_plus_plus(MODELS, INPUTS, [lambda w, x: (x, {"layers.0.weight": np.ones((2, 5))})])


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
def test_modules_of_torch() -> None:
    """As the docstring has it."""
    import torch

    def net(seed: int) -> Any:
        torch.manual_seed(seed)
        parts = [torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.Linear(6, 4)) for _ in range(2)]
        return torch.nn.ModuleDict({"layers": torch.nn.ModuleList(parts)})

    models = [net(seed) for seed in range(2)]

    def block(name: str) -> Block:
        layer = models[0].get_submodule(name)
        linear = {part: m for part, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}

        def run(tensors: Mapping[str, Any], x: Any) -> tuple[Any, Mapping[str, Any]]:
            seen: dict[str, Any] = {}

            def see(key: str) -> Any:
                return lambda _, given: seen.update({key: given[0]})

            hooks = [m.register_forward_pre_hook(see(f"{name}.{part}.weight")) for part, m in linear.items()]
            own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            with torch.no_grad():
                out = torch.func.functional_call(layer, own, (x,))
            for hook in hooks:
                hook.remove()
            return out, seen

        return run

    blocks, inputs = [block(f"layers.{i}") for i in range(2)], [[torch.randn(20, 4)] for _ in models]
    found = smelt.regmean_plus_plus(models, inputs, blocks)
    models[0].load_state_dict(found)
    alike = smelt.regmean_plus_plus([models[1], models[1]], inputs, blocks)
    torch.testing.assert_close(alike, models[1].state_dict())

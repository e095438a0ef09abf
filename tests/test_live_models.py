"""Live models: modules in, a state dict out, ties kept; and merging under autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.errors import OperationFailed, UsageError

torch = pytest.importorskip("torch")


class Tied(torch.nn.Module):  # type: ignore[misc, name-defined]
    """An embedding that is its own head, a layer, and a buffer of integers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(6, 4)
        self.layer = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor([1, 2]))


def like(base: Tied, seed: int) -> Tied:
    model = Tied(seed)
    with torch.no_grad():
        for mine, other in zip(model.parameters(), base.parameters(), strict=True):
            mine.copy_(other + 0.01 * mine)
    return model


BASE = Tied(0)
MODELS = [like(BASE, 1), like(BASE, 2)]


def test_modules_merge_into_a_state_dict_that_loads() -> None:
    merged = smelt.merge_tensors("task_arithmetic", MODELS, BASE, parameters={"weight": 0.5})
    target = Tied(9)
    target.load_state_dict(merged)
    assert merged["head.weight"] is merged["embed.weight"]
    assert target.head.weight is target.embed.weight
    arrays = [{k: v.detach().numpy() for k, v in m.state_dict().items()} for m in (BASE, *MODELS)]
    same = smelt.merge_tensors("task_arithmetic", arrays[1:], arrays[0], parameters={"weight": 0.5})
    assert all(np.array_equal(merged[name].numpy(), same[name]) for name in same)


def test_tied_weights_are_drawn_once() -> None:
    """Untied in one model: they are merged apart, and differ."""
    untied = {name: tensor.clone() for name, tensor in MODELS[1].state_dict().items()}
    for models, tied in ((MODELS, True), ([MODELS[0], untied], False)):
        merged = smelt.merge_tensors("dare", models, BASE, parameters={"drop_rate": 0.5})
        assert bool(torch.equal(merged["head.weight"], merged["embed.weight"])) is tied


def test_modules_take_part_in_recipes(tmp_path: Path) -> None:
    entries = [{"model": name, "parameters": {"weight": 1}} for name in ("one", "two")]
    models = dict(zip(("one", "two"), MODELS, strict=True))
    smelt.merge({"merge_method": "linear", "models": entries}, tmp_path / "out", models=models)
    merged = smelt.load(tmp_path / "out")
    wanted = (MODELS[0].layer.weight + MODELS[1].layer.weight) / 2
    np.testing.assert_allclose(merged["layer.weight"], wanted.detach().numpy(), rtol=1e-6)


# --- gradients ------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.7},
    "task_arithmetic": {"weight": 0.7, "lambda": 0.5},
    "ties": {"weight": 0.7, "lambda": 0.5, "density": 0.5},
    "dare_linear": {"weight": 0.7, "lambda": 0.5, "density": 0.5},
    "slerp": {"t": 0.3},
}


def tensors(count: int, dtype: Any = torch.float32) -> list[dict[str, Any]]:
    torch.manual_seed(3)
    base = torch.randn(5, 7)
    made = [base + 0.3 * torch.randn(5, 7) for _ in range(count)]
    return [{"w": x.to(dtype).requires_grad_()} for x in (base, *made)]


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_live_result_has_the_bits_of_the_other(method: str, dtype: Any) -> None:
    base, *models = tensors(1 if method == "slerp" else 2, dtype)
    given: dict[str, Any] = {"base": None if method == "linear" else base, "parameters": SETTINGS[method]}
    live = smelt.merge_tensors(method, models, differentiable=True, **given)
    dead = smelt.merge_tensors(method, models, **given)
    assert torch.equal(live["w"], dead["w"])
    assert live["w"].requires_grad
    assert not dead["w"].requires_grad


def test_of_equal_magnitudes_the_live_result_keeps_the_same() -> None:
    base, one, other = (torch.randint(-2, 3, (30, 40)).float() for _ in range(3))
    given: dict[str, Any] = {"base": {"w": base}, "parameters": {"variant": "mergekit"}}
    given["per_model"] = {"weight": [1.0, 1.0], "density": [0.3, 0.5]}
    live = smelt.merge_tensors("ties", [{"w": one}, {"w": other}], differentiable=True, **given)
    dead = smelt.merge_tensors("ties", [{"w": one}, {"w": other}], **given)
    assert torch.equal(live["w"], dead["w"])


def test_gradients_are_those_of_the_formula() -> None:
    """Against finite differences, for models, base, weights and lambda; statistics stay as they are."""
    base, *models = tensors(2, torch.float64)
    weights = torch.tensor([0.4, 0.9], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def merged(a: Any, b: Any, c: Any, w: Any, s: Any) -> Any:
        return smelt.merge_tensors(
            "task_arithmetic", [{"w": b}, {"w": c}], {"w": a}, differentiable=True,
            parameters={"lambda": s, "variant": "mergekit", "normalize": True}, per_model={"weight": w},
        )["w"]  # fmt: skip

    inputs = (base["w"], models[0]["w"], models[1]["w"], weights, scale)
    assert torch.autograd.gradcheck(merged, inputs)


@pytest.mark.parametrize("parallel", [True, False])
def test_slerp_learns_its_t(parallel: bool) -> None:
    a, b = (torch.randn(4, 4, dtype=torch.float64) for _ in range(2))
    b = a * 1.5 if parallel else b
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def merged(t: Any) -> Any:
        return smelt.merge_tensors("slerp", [{"w": b}], {"w": a}, parameters={"t": t}, differentiable=True)["w"]

    assert torch.autograd.gradcheck(merged, (t,))


def test_weights_can_be_learned() -> None:
    base, *models = tensors(2)
    target = base["w"].detach() + 0.8 * (models[0]["w"] - base["w"]).detach()
    weights = torch.tensor([0.3, 0.3], requires_grad=True)
    optimiser = torch.optim.Adam([weights], lr=0.05)
    for _ in range(150):
        merged = smelt.merge_tensors(
            "task_arithmetic", models, base, per_model={"weight": weights}, differentiable=True
        )
        loss = (merged["w"] - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    np.testing.assert_allclose(weights.detach().numpy(), [0.8, 0.0], atol=0.02)


def test_gradients_reach_tied_modules_and_ties_hold() -> None:
    merged = smelt.merge_tensors("linear", MODELS, differentiable=True)
    assert merged["head.weight"] is merged["embed.weight"]
    merged["head.weight"].sum().backward()
    assert torch.allclose(MODELS[0].embed.weight.grad, torch.full((6, 4), 0.5))
    assert torch.equal(merged["steps"], torch.tensor([1, 2]))


def test_what_has_no_gradient_says_so() -> None:
    base, *models = tensors(2)
    density = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(UsageError, match="no gradient flows to density here: pass it as a number"):
        smelt.merge_tensors("ties", models, base, parameters={"density": density}, differentiable=True)
    broken = {"w": torch.full((5, 7), float("nan"))}
    with pytest.raises(OperationFailed, match="'w': an input or the result holds NaN"):
        smelt.merge_tensors("linear", [models[0], broken], differentiable=True)
    if "regmean" in smelt.methods.names():
        gram = [{"gram": {"w": np.eye(7, dtype=np.float32)}} for _ in models]
        with pytest.raises(UsageError, match="works on whole matrices, which no gradient"):
            smelt.merge_tensors("regmean", models, statistics=gram, differentiable=True)

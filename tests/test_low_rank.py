"""Adapters on one base, merged from their factors: the numbers, what is read and held, and when it is not done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.checkpoint import Checkpoint, load_adapted
from smelt.checkpoint.adapter import AdaptedCheckpoint, parse
from smelt.methods import low_rank
from tests.lora_files import factors

Arrays = Mapping[str, Any]

#: Attention and feed-forward, tall and wide, and what no adapter has.
SHAPES = {
    "model.layers.0.self_attn.q_proj": (40, 40), "model.layers.0.mlp.up_proj": (96, 40),
    "model.layers.0.mlp.down_proj": (40, 96), "model.layers.1.mlp.down_proj": (40, 96),
}  # fmt: skip
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "knots": ("knots", {}), "input": ("knots", {"shared": "input"}), "own bars": ("knots", {"scope": "tensor"}),
    "all": ("knots", {"rule": "tv", "density": 1.0, "merge_func": "sum"}), "dropped": ("knots", {"drop_rate": 0.5}),
    "dropped input": ("knots", {"drop_rate": 0.5, "shared": "input"}), "tsv": ("tsv", {"alpha": 0.5}),
    "tsv plain": ("tsv", {"orthogonalise": False, "rank_fraction": 0.05}), "iso_c": ("iso", {"variant": "iso_c"}),
    "iso_c some": ("iso", {"variant": "iso_c", "beta": 0.5, "sigma_over": "rank"}),
    "iso_cts": ("iso", {"variant": "iso_cts"}), "aswudi": ("wudi", {}), "iwudi": ("wudi", {"variant": "iwudi"}),
    "swudi": ("wudi", {"variant": "swudi", "init": "mean"}), "optmerge": ("optmerge", {"mode": "lora"}),
    "auto": ("optmerge", {}),
}  # fmt: skip


def whole(array: Any, step: int) -> Any:
    """Multiples of 1 / step, so that sums and products are exact in fp32."""
    return (np.round(array * step) / step).astype(np.float32)


def base() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    arrays = {f"{name}.weight": whole(draw.standard_normal(shape), 64) for name, shape in SHAPES.items()}
    return {**arrays, "model.norm.weight": whole(draw.standard_normal(40), 64)}


def adapters(shapes: Sequence[Mapping[str, tuple[int, int]]] = (SHAPES, SHAPES, SHAPES)) -> list[Arrays]:
    """Ranks 1, 2, 3."""
    made = (factors(rank, 7, names) for rank, names in enumerate(shapes, 1))
    return [{name: whole(array, 8) for name, array in tensors.items()} for tensors in made]


def adapted(start: Checkpoint, tensors: Arrays, weight: float = 1.0) -> Checkpoint:
    rank = next(len(array) for name, array in tensors.items() if "lora_A" in name)
    adapter = parse(smelt.load(dict(tensors)), {"peft_type": "LORA", "r": rank, "lora_alpha": rank / 2})
    return load_adapted(start, [(adapter, weight)], f"rank {rank}")


def models(start: Checkpoint, given: Sequence[Arrays] | None = None) -> list[Checkpoint]:
    return [adapted(start, tensors) for tensors in (adapters() if given is None else given)]


def folded(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: checkpoint[name] for name in checkpoint}


def merged(run: str, given: Sequence[Any], start: Any, **more: Any) -> dict[str, Any]:
    method, parameters = RUNS[run]
    return smelt.merge_tensors(method, given, start, parameters=parameters, dtype="float32", **more)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors of adapted models that are read element by element."""
    found: list[str] = []
    original = AdaptedCheckpoint.read

    def read(self: Any, name: str, *given: Any) -> None:
        found.append(name)
        original(self, name, *given)

    monkeypatch.setattr(AdaptedCheckpoint, "read", read)
    return found


@pytest.mark.parametrize("run", RUNS)
def test_factors_give_what_the_models_give(run: str, unread: list[str]) -> None:
    start = smelt.load(base())
    wanted = merged(run, [folded(model) for model in models(start)], base())
    unread.clear()
    found = merged(run, models(start), start)
    assert unread == []
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=4e-6, err_msg=name)
        assert (found[name] != start[name]).any() == (name != "model.norm.weight")


@pytest.mark.parametrize("run", RUNS)
def test_the_bits_do_not_depend_on_threads(run: str) -> None:
    start = smelt.load(base())
    one, many = (merged(run, models(start), start, threads=threads) for threads in (1, 5))
    assert all(one[name].tobytes() == many[name].tobytes() for name in one)

"""Recipes that stack layers: the patterns, what becomes of copies, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import smelt
from smelt.cli import main
from tests.small_models import CONFIG, LAYERS, Arrays, fine_tuned, llama, save


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    base = llama(0)
    return [save(tmp_path / name, arrays) for name, arrays in (("a", base), ("b", fine_tuned(base, 1)))]


def layers(recipe: dict[str, Any]) -> list[tuple[str, int]]:
    """(model, layer) from bottom to top."""
    sources = [source for piece in recipe["slices"] for source in piece["sources"]]
    return [(Path(s["model"]).name, layer) for s in sources for layer in range(*s["layer_range"])]


def merged(recipe: dict[str, Any], out: Path) -> Arrays:
    smelt.merge(recipe, out)
    with smelt.load(out) as checkpoint:
        return dict(checkpoint)


def test_one_whole_block_is_the_model(models: list[str], tmp_path: Path) -> None:
    result, model = merged(smelt.stack("blocks", models[:1]), tmp_path / "out"), llama(0)
    assert result.keys() == model.keys()
    assert all((result[name] == model[name]).all() for name in model)


def test_blocks_stack_overlap_and_prune(models: list[str]) -> None:
    a, b = models
    recipe = smelt.stack("blocks", [f"{a}[0:2]", f"{b}[1:]", f"{a}[-1:]", f"{b}[:-1]"], dtype="float32")
    assert layers(recipe) == [("a", 0), ("a", 1), ("b", 1), ("a", 1), ("b", 0)]
    assert recipe["dtype"] == "float32"


def test_blocks_of_models_in_turn(models: list[str]) -> None:
    assert layers(smelt.stack("interleave", models, size=1)) == [("a", 0), ("b", 1)]
    assert layers(smelt.stack("interleave", models, size=2, step=1)) == [("a", 0), ("a", 1)]
    assert layers(smelt.stack("interleave", models[:1], size=1)) == [("a", layer) for layer in range(LAYERS)]


def test_copies_begin_as_the_identity(models: list[str], tmp_path: Path) -> None:
    """Layer 1 is a copy of layer 0 that adds nothing; everything else of it is there to be trained."""
    result, model = merged(smelt.stack("repeat", models[:1]), tmp_path / "out"), llama(0)
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        assert not result[f"model.layers.1.{part}.weight"].any()
        assert (result[f"model.layers.2.{part}.weight"] == model[f"model.layers.1.{part}.weight"]).all()
    assert (result["model.layers.1.mlp.up_proj.weight"] == model["model.layers.0.mlp.up_proj.weight"]).all()
    assert {name.split(".")[2] for name in result if ".layers." in name} == {"0", "1", "2", "3"}


def test_copies_can_be_scaled(models: list[str], tmp_path: Path) -> None:
    recipe = smelt.stack("blocks", [models[0], f"{models[0]}[1:]"], scale=0.5)
    result, name = merged(recipe, tmp_path / "out"), "self_attn.o_proj.weight"
    original = llama(0)[f"model.layers.1.{name}"]
    assert (result[f"model.layers.1.{name}"] == original).all()
    assert (result[f"model.layers.2.{name}"] == np.float32(0.5) * original).all()


def test_repetition_counts(models: list[str]) -> None:
    recipe = smelt.stack("repeat", models[:1], every=2, times=2, scale=1)
    assert layers(recipe) == [("a", 0), ("a", 1), ("a", 1), ("a", 1)]


def test_shuffles_are_a_matter_of_seed_and_weight(models: list[str]) -> None:
    shuffles = [layers(smelt.stack("shuffle", models, seed=seed)) for seed in (*range(20), 0)]
    assert shuffles[0] == shuffles[-1]
    assert len({tuple(shuffle) for shuffle in shuffles}) == 4, "every combination occurs"
    assert all([layer for _, layer in shuffle] == [0, 1] for shuffle in shuffles)
    assert {m for s in range(9) for m, _ in layers(smelt.stack("shuffle", models, weights=[0, 2], seed=s))} == {"b"}
    places = {layer for s in range(9) for _, layer in layers(smelt.stack("shuffle", models, full_random=True, seed=s))}
    assert places == {0, 1}


MISTAKES = {
    "no pattern 'block'; did you mean 'blocks'?": ("block", {}),
    "size has no effect in the pattern shuffle": ("shuffle", {"size": 2}),
    "the pattern interleave needs size": ("interleave", {}),
    "the pattern repeat takes one model, not 2": ("repeat", {}),
    "step must be at least 1, not 0": ("interleave", {"size": 2, "step": 0}),
    "weights must be one for each of 2 models": ("shuffle", {"weights": [1]}),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told(message: str, models: list[str]) -> None:
    pattern, options = MISTAKES[message]
    with pytest.raises(smelt.UsageError) as caught:
        smelt.stack(pattern, models, **options)
    assert message in str(caught.value)


def test_empty_blocks_and_unequal_depths(models: list[str], tmp_path: Path) -> None:
    with pytest.raises(smelt.UsageError, match="holds no layer: the model has 2"):
        smelt.stack("blocks", [f"{models[0]}[1:1]"])
    shallow = {name: array for name, array in llama(0).items() if ".layers.1." not in name}
    other = save(tmp_path / "c", shallow, config={**CONFIG, "num_hidden_layers": 1})
    with pytest.raises(smelt.InputRejected, match="among models of one depth"):
        smelt.stack("shuffle", [models[0], other])
    plain = save(tmp_path / "d", {"w": np.ones((2, 2), np.float32)}, config={})
    with pytest.raises(smelt.InputRejected, match="it cannot be told what its layers are"):
        smelt.stack("blocks", [plain])


def test_a_scale_that_a_norm_undoes_is_refused(tmp_path: Path) -> None:
    """Gemma 2 normalises what a layer adds: only zero survives that."""
    arrays = llama(0)
    arrays |= {f"model.layers.{i}.post_feedforward_layernorm.weight": np.ones(64, np.float32) for i in range(LAYERS)}
    model = save(tmp_path / "a", arrays)
    assert smelt.stack("repeat", [model])["slices"]
    with pytest.raises(smelt.InputRejected, match="a scale other than 0 has no effect"):
        smelt.stack("repeat", [model], scale=0.5)


def test_the_command_prints_a_recipe(models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stack", "shuffle", *models, "-w", "1", "-w", "2", "--seed", "5"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == smelt.stack("shuffle", models, weights=[1, 2], seed=5)
    assert main(["stack", "repeat", models[0], "--size", "2"]) == 2


def test_identity_copies_keep_the_logits(tmp_path: Path) -> None:
    """A Llama of twice the depth computes the same."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = save(tmp_path / "a", llama(0), config={**CONFIG, "torch_dtype": "float32"})
    smelt.merge(smelt.stack("repeat", [model]), tmp_path / "deep")
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        shallow, deep = (
            transformers.AutoModelForCausalLM.from_pretrained(path)(tokens).logits
            for path in (model, tmp_path / "deep")
        )
    assert torch.equal(shallow, deep)

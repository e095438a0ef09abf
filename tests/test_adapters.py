"""LoRA extraction: what the adapter reproduces, what it says of the rest, and how PEFT finds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import smelt
from smelt.checkpoint import load_adapter
from smelt.cli import main
from tests.small_models import CONFIG, HIDDEN, Arrays, bf16, fine_tuned, llama, save


def matrix(*shape: int, seed: int = 0, scale: float = 1.0) -> Any:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def low_rank_change(base: Arrays, rank: int) -> Arrays:
    """A fine-tune whose every linear layer has moved by a matrix of this rank."""
    changed = dict(base)
    for seed, (name, array) in enumerate(sorted(base.items())):
        if name.endswith("_proj.weight"):
            rows, columns = array.shape
            changed[name] = array + matrix(rows, rank, seed=seed, scale=0.01) @ matrix(rank, columns, seed=seed + 100)
    return changed


def applied(base: Arrays, out: Path) -> Arrays:
    """The base with the adapter added as PEFT adds it (alpha equals the rank everywhere)."""
    result = dict(base)
    with load_adapter(out) as adapter:
        for key, array in adapter.items():
            module, _, part = key.removeprefix("base_model.model.").partition(".lora_")
            if part == "A.weight":
                name = f"{module}.weight"
                b = adapter[key.replace("lora_A", "lora_B")].astype(np.float64)
                change = b.reshape(len(b), -1) @ array.reshape(len(array), -1).astype(np.float64)
                result[name] = base[name] + change.reshape(base[name].shape)
            elif part == "embedding_A":
                result[f"{module}.weight"] = base[f"{module}.weight"] + (adapter[key[:-1] + "B"] @ array).T
            elif part == "B.bias":
                result[f"{module}.bias"] = base[f"{module}.bias"] + array
            elif not part:
                result[module] = array
    return result


def config(out: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((out / "adapter_config.json").read_text())
    return read


def distance(a: Arrays, b: Arrays) -> float:
    return float(np.sqrt(sum(((a[n].astype(np.float64) - b[n].astype(np.float64)) ** 2).sum() for n in a)))


def test_full_rank_gives_the_fine_tune(tmp_path: Path) -> None:
    base, model = llama(0), fine_tuned(llama(0), 1)
    result = smelt.extract_lora(base, model, tmp_path / "out", embeddings=True, rank=1000)
    assert result.error < 1e-6
    assert distance(applied(base, tmp_path / "out"), model) < 1e-6 * distance(base, model) + 1e-5
    assert smelt.verify(tmp_path / "out").ok


def test_a_merged_adapter_is_found_again(tmp_path: Path) -> None:
    """A change of rank 3 needs rank 3, and nothing else is stored."""
    base = llama(0)
    result = smelt.extract_lora(base, low_rank_change(base, 3), tmp_path / "out", error=1e-3)
    found = [module for module in result.modules if module.stored != "nothing"]
    assert {module.rank for module in found} == {3}
    assert all(module.module.endswith("_proj") for module in found)
    assert result.error < 1e-3
    assert config(tmp_path / "out")["modules_to_save"] is None


def test_rounding_hides_no_rank(tmp_path: Path) -> None:
    """In bfloat16 the change is of full rank, but only three directions are more than rounding."""
    base = bf16(llama(0))
    model = bf16(low_rank_change({name: array.astype(np.float32) for name, array in base.items()}, 3))
    result = smelt.extract_lora(base, model, tmp_path / "out")
    assert {m.above_rounding for m in result.modules if m.stored == "low rank"} == {3}
    assert min(m.rank for m in result.modules if m.stored == "low rank") > 30


def test_the_error_that_is_told_is_the_error(tmp_path: Path) -> None:
    """Per module, and with factors rounded to bfloat16, which is part of it."""
    base, model = llama(0), fine_tuned(llama(0), 1)
    result = smelt.extract_lora(base, model, tmp_path / "out", rank=5, factor_dtype="bfloat16")
    got = applied(base, tmp_path / "out")
    for module in result.modules:
        name = f"{module.module}.weight"
        missing = np.linalg.norm(model[name].astype(np.float64) - got[name])
        assert module.error == pytest.approx(missing, rel=1e-4, abs=1e-6)
    assert result.error == pytest.approx(distance(got, model) / distance(base, model), rel=1e-4)
    assert any("of low rank" in warning for warning in result.warnings)


@pytest.mark.parametrize("error", [0.5, 0.1])
def test_as_few_directions_as_the_error_allows(error: float, tmp_path: Path) -> None:
    base, model = {"a.weight": matrix(40, 30)}, {"a.weight": matrix(40, 30, seed=1)}
    (module,) = smelt.extract_lora(base, model, tmp_path / "out", error=error).modules
    spectrum = np.linalg.svd((model["a.weight"] - base["a.weight"]).astype(np.float64))[1]
    tails = [np.sqrt((spectrum[rank:] ** 2).sum() / (spectrum**2).sum()) for rank in range(31)]
    assert module.rank == next(rank for rank, tail in enumerate(tails) if tail <= error)
    assert module.relative_error == pytest.approx(tails[module.rank], rel=1e-5)


def test_bits_depend_on_the_models_alone(tmp_path: Path) -> None:
    base, model = llama(0), fine_tuned(llama(0), 1)
    for name, options in {"a": {"threads": 1}, "b": {"threads": 4}, "c": {"memory": "256MiB"}}.items():
        smelt.extract_lora(base, model, tmp_path / name, rank=7, **options)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] == files[2]


def test_scale_in_one_factor(tmp_path: Path) -> None:
    """Without distribution the columns of B have length one."""
    smelt.extract_lora({"a.weight": matrix(9, 5)}, {"a.weight": matrix(9, 5, seed=1)}, tmp_path / "o", rank=2,
                       distribute_scale=False)  # fmt: skip
    with load_adapter(tmp_path / "o") as adapter:
        b = adapter["base_model.model.a.lora_B.weight"]
    assert np.linalg.norm(b, axis=0) == pytest.approx(1)


# --- kinds of modules -----------------------------------------------------------------------------------


def test_biases_and_convolutions(tmp_path: Path) -> None:
    base = {"a.weight": matrix(6, 4), "a.bias": matrix(6), "conv.weight": matrix(8, 3, 2, 2), "n.weight": matrix(4)}
    model = {name: array + matrix(*array.shape, seed=9) for name, array in base.items()}
    smelt.extract_lora(base, model, tmp_path / "out")
    assert distance(applied(base, tmp_path / "out"), model) < 1e-5
    assert config(tmp_path / "out")["lora_bias"] is True
    with load_adapter(tmp_path / "out") as adapter:
        assert adapter.tensors["base_model.model.conv.lora_A.weight"].shape == (8, 3, 2, 2)
        assert adapter.tensors["base_model.model.conv.lora_B.weight"].shape == (8, 8, 1, 1)
        assert adapter["base_model.model.n.weight"].tolist() == model["n.weight"].tolist()


def test_layers_stored_as_in_by_out(tmp_path: Path) -> None:
    """GPT-2's: PEFT turns the product round."""
    base, model = {"h.0.attn.c_attn.weight": matrix(4, 12)}, {"h.0.attn.c_attn.weight": matrix(4, 12, seed=1)}
    paths = [save(tmp_path / n, a, config={"model_type": "gpt2", "n_layer": 1}) for n, a in (("b", base), ("m", model))]
    smelt.extract_lora(*paths, tmp_path / "out")
    assert config(tmp_path / "out")["fan_in_fan_out"] is True
    with load_adapter(tmp_path / "out") as adapter:
        b, a = (adapter[f"base_model.model.h.0.attn.c_attn.lora_{x}.weight"] for x in "BA")
    assert (b.shape, a.shape) == ((12, 4), (4, 4))
    assert base["h.0.attn.c_attn.weight"] + (b @ a).T == pytest.approx(model["h.0.attn.c_attn.weight"], abs=1e-5)


def test_what_no_adapter_can_hold_is_told(tmp_path: Path) -> None:
    base = {"m.a_log": matrix(4), "m.in.weight": matrix(4, 4)}
    model = {name: array + 1 for name, array in base.items()}
    result = smelt.extract_lora(base, model, tmp_path / "out")
    assert "left out although they differ: 'm'" in result.warnings[0]
    assert result.error > 0.4


def test_another_vocabulary_is_stored_whole(tmp_path: Path) -> None:
    base = llama(0)
    model = {**base, **{name: array for name, array in llama(0, 100).items() if len(array) == 100}}
    result = smelt.extract_lora(base, model, tmp_path / "out", embeddings=True)
    assert {m.module for m in result.modules if m.stored == "whole"} == {"lm_head", "model.embed_tokens"}
    assert "another number of tokens" in result.warnings[0]


def test_a_head_that_the_base_ties(tmp_path: Path) -> None:
    model = fine_tuned(llama(0), 1)
    tied = {name: array for name, array in llama(0).items() if name != "lm_head.weight"}
    base = save(tmp_path / "base", tied, config={**CONFIG, "tie_word_embeddings": True})
    result = smelt.extract_lora(base, model, tmp_path / "out", rank=1000, embeddings=True)
    head = next(module for module in result.modules if module.module == "lm_head")
    assert head.norm == pytest.approx(
        np.linalg.norm(model["lm_head.weight"] - tied["model.embed_tokens.weight"]), rel=1e-5
    )


# --- which modules, and their names ---------------------------------------------------------------------


def test_names_are_whole_where_their_ends_mean_others_too(tmp_path: Path) -> None:
    base, model = llama(0), fine_tuned(llama(0), 1)
    smelt.extract_lora(base, model, tmp_path / "out", exclude=["layers.0.*q_proj"], save_modules=["v_proj"])
    written = config(tmp_path / "out")
    assert "model.layers.1.self_attn.q_proj" in written["target_modules"]
    assert not {"q_proj", "v_proj"} & set(written["target_modules"])
    assert {"k_proj", "o_proj"} <= set(written["target_modules"])
    assert "v_proj" in written["modules_to_save"]


def test_include_and_skip(tmp_path: Path) -> None:
    base, model = llama(0), fine_tuned(llama(0), 1)
    result = smelt.extract_lora(base, model, tmp_path / "out", include=["mlp", "norm"], skip_undecomposable=True)
    assert {m.module.split(".")[-2] for m in result.modules if m.stored != "nothing"} == {"mlp"}


def test_ranks_differ(tmp_path: Path) -> None:
    result = smelt.extract_lora(llama(0), fine_tuned(llama(0), 1), tmp_path / "out", sv_epsilon=0.012)
    ranks = {module.module: module.rank for module in result.modules if module.rank}
    written = config(tmp_path / "out")
    assert written["r"] == written["lora_alpha"] == max(ranks.values())
    assert written["rank_pattern"] == written["alpha_pattern"]
    assert {name: written["rank_pattern"].get(name, written["r"]) for name in ranks} == ranks
    assert len(set(ranks.values())) > 1


# --- mistakes -------------------------------------------------------------------------------------------

A = {"a.weight": matrix(4, 4)}
MISTAKES: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "rank": (A, A, {"rank": 0}, "rank must be at least 1, not 0"),
    "error": (A, A, {"error": 1.0}, r"error must lie in \[0, 1\)"),
    "epsilon": (A, A, {"sv_epsilon": -1}, "sv_epsilon must be 0 or more"),
    "dtype": (A, A, {"factor_dtype": "int8"}, "factor_dtype must be float32"),
    "pattern": (A, A, {"include": ["("]}, "'\\(' is not a regular expression"),
    "memory": (A, {"a.weight": matrix(4, 4, seed=1)}, {"memory": 100}, "memory must be at least 193MiB, for"),
    "equal": (A, A, {}, "nothing to extract"),
    "missing": ({}, A, {}, "tensor 'a.weight' of model is missing"),
    "shape": ({"a.weight": matrix(4, 3)}, A, {}, r"tensor 'a.weight' is \[4, 4\] in model and \[4, 3\] in base"),
    "nan": (A, {"a.weight": matrix(4, 4) * np.nan}, {}, "model: tensor 'a.weight' holds NaN or Inf"),
    "infinite": ({"a.weight": matrix(4, 4) * np.inf}, A, {}, "base: tensor 'a.weight' holds NaN or Inf"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_mistakes_are_told_and_leave_nothing(mistake: str, tmp_path: Path) -> None:
    base, model, options, message = MISTAKES[mistake]
    with pytest.raises(smelt.SmeltError, match=message):
        smelt.extract_lora(base, model, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tmp_path / "base", bf16(llama(0)))
    model = save(tmp_path / "model", bf16(fine_tuned(llama(0), 1, 0.01)))
    out = tmp_path / "out"
    assert main(["lora", "extract", base, model, str(out), "--rank", "4", "--dtype", "bfloat16"]) == 0
    told = capsys.readouterr()
    assert "model.layers.1.mlp.up_proj" in told.out
    assert "of the difference's norm is left out" in told.err
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "smelt-manifest.json",
    ]  # fmt: skip
    assert config(out)["task_type"] == "CAUSAL_LM"
    assert config(out)["base_model_name_or_path"] == "base"
    assert str(tmp_path) not in (out / "smelt-manifest.json").read_text()
    with load_adapter(out) as adapter:
        q = adapter["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert (q.shape, q.dtype) == ((4, HIDDEN), ml_dtypes.bfloat16)
    assert main(["verify", str(out)]) == 0
    assert main(["lora", "extract", base, model, str(out)]) == 2, "the destination is full"

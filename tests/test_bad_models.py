"""Models that cannot be merged with each other: refused with exit code 3 in one line each, leaving nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import smelt
from smelt.cli import main
from smelt.errors import SmeltError
from tests.commands import refused_merge
from tests.recipes import Family, recipe
from tests.small_models import CONFIG, TOKENS, Arrays, bf16, fine_tuned, llama, save

QUERY, KEY = (f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qk")
EMBEDDING = "model.embed_tokens.weight"


def without(model: Arrays, *names: str) -> Arrays:
    return {name: array for name, array in model.items() if name not in names}


def configured(**changes: Any) -> Callable[[Path, Arrays], str]:
    return lambda folder, model: save(folder, model, config={**CONFIG, **changes})


def changed(change: Callable[[Arrays], Arrays]) -> Callable[[Path, Arrays], str]:
    return lambda folder, model: save(folder, change(model))


def with_tokens(tokens: list[str]) -> Callable[[Path, Arrays], str]:
    return lambda folder, model: save(folder, model, tokens=tokens)


def longer(model: Arrays) -> Arrays:
    return {n: np.concatenate([a, a[:4]]) if n in (EMBEDDING, "lm_head.weight") else a for n, a in model.items()}


FP8 = ml_dtypes.float8_e4m3fn

#: (number in the list of bad inputs and what it is, how the model is written, pattern of the message)
MODELS: list[tuple[str, Callable[[Path, Arrays], str], str]] = [
    ("63 missing tensor", changed(lambda m: without(m, QUERY)), rf"'{QUERY}' is in .* but not in .*odd"),
    ("64 extra tensor", changed(lambda m: {**m, "x": m[KEY]}), "'x' is in .*odd but not in"),
    (
        "65 another shape",
        changed(lambda m: {**m, KEY: m[KEY][:16]}),
        rf"'{KEY}': shapes differ.*\[32, 64\].*\[16, 64\]",
    ),
    ("65 another rank", changed(lambda m: {**m, KEY: m[KEY].reshape(-1)}), rf"'{KEY}': shapes differ"),
    ("66 more tokens", changed(longer), "shapes differ.*vocabularies differ"),
    ("67 other tokens", with_tokens([TOKENS[1], TOKENS[0], *TOKENS[2:]]), "mean different tokens by 2 equal ids"),
    ("68 another family", configured(model_type="mistral"), "differ in model type: 'mistral'"),
    ("68 other heads", configured(num_key_value_heads=1), "differ in key value heads"),
    ("70 tied", configured(tie_word_embeddings=True), "differ in tied embeddings"),
    (
        "72 another layout",  # of GPT-2 the matrices lie transposed, which square ones do not show
        lambda folder, model: save(folder, model, config={**CONFIG, "model_type": "gpt2"}),
        "differ in model type: 'gpt2'",
    ),
    ("71 integers", changed(lambda m: {**m, KEY: m[KEY].view(np.int16)}), f"'{KEY}': floating in some models and not"),
    ("76 quantised", configured(quantization_config={"quant_method": "fp8"}), r"odd: a quantised checkpoint \('fp8'\)"),
    (
        "77 FP8",
        changed(lambda m: {**m, KEY: m[KEY].astype(FP8)}),
        f"'{KEY}' in 'model.safetensors' is F8_E4M3, a quant",
    ),
    ("no weights at all", lambda folder, model: str(folder), "no such file or folder"),
]


@pytest.mark.parametrize(("build", "message"), [row[1:] for row in MODELS], ids=[row[0] for row in MODELS])
def test_a_model_that_does_not_fit(
    build: Callable[[Path, Arrays], str], message: str, family: Family, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    odd = build(tmp_path / "odd", bf16(fine_tuned(llama(0), 5)))
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(recipe("linear", [family.models[0], odd])))
    code, told = refused_merge(capsys, path, tmp_path / "out")
    assert code == 3
    assert re.search(message, "\n".join(told))


def test_all_that_does_not_fit_is_told_at_once(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = family.model_arrays[1]
    odd = save(tmp_path / "odd", {**without(model, QUERY), KEY: model[KEY].reshape(-1), "x": model[KEY]})
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(recipe("linear", [family.models[0], odd])))
    _, told = refused_merge(capsys, path, tmp_path / "out")
    assert {QUERY, "x"} <= {name for line in told for name in re.findall(r"tensor '([^']+)'", line)}


def test_missing_models_are_all_named(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(recipe("linear", [tmp_path / "none", family.models[0], tmp_path / "nothing"])))
    code, told = refused_merge(capsys, path, tmp_path / "out")
    assert code == 3
    assert len(told) == 2
    assert "none" in told[0]
    assert "nothing" in told[1]


def test_settings_that_training_may_change_are_only_strictly_refused(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """69: rotary base, activation, epsilon."""
    odd = save(tmp_path / "odd", family.model_arrays[1], config={**CONFIG, "rope_theta": 500000.0})
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(recipe("linear", [family.models[0], odd])))
    code, told = refused_merge(capsys, path, tmp_path / "out", "--strict")
    assert code == 3
    assert "differ in" in told[0]
    assert main(["merge", str(path), str(tmp_path / "out")]) == 0
    assert "warning: " in capsys.readouterr().err


def test_layers_that_are_not_understood_are_told(family: Family, tmp_path: Path) -> None:
    """Gradients over the depth would otherwise have no effect, silently."""
    odd = save(tmp_path / "odd", family.model_arrays[1], config={**CONFIG, "num_hidden_layers": 7})
    planned = smelt.plan(recipe("linear", [odd, family.models[0]]))
    planned.close()
    assert any("odd: model.layers holds 2 numbered blocks" in notice for notice in planned.notices)


def test_force_merges_what_only_the_configs_forbid(family: Family, tmp_path: Path) -> None:
    odd = save(tmp_path / "odd", family.model_arrays[1], config={**CONFIG, "num_key_value_heads": 1})
    artifact = smelt.merge(recipe("linear", [family.models[0], odd]), tmp_path / "out", force=True)
    assert any("differ in key value heads" in warning for warning in artifact.warnings)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = [*CONFIG, "quantization_config", "layer_types", "text_config", "vision_config", "num_nextn_predict_layers",
        "rope_scaling", "dtype", "sliding_window", "mlp_only_layers", "first_k_dense_replace"]  # fmt: skip


@settings(max_examples=60)
@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
def test_no_config_breaks_the_plan(changes: dict[str, Any], config_folder: tuple[Path, str]) -> None:
    """Whatever config.json says, there is a plan or a refusal that was meant."""
    folder, other = config_folder
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    try:
        smelt.plan(recipe("linear", [str(folder), other])).close()
    except SmeltError as error:
        told = error.problems
    else:
        told = ("a plan",)
    assert all(line and "\n" not in line for line in told)


@pytest.fixture(scope="module")
def config_folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return Path(save(tmp_path_factory.mktemp("odd") / "model", family.model_arrays[0])), family.models[1]

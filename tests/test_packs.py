"""Delta packs: base+pack is the fine-tune, as far as the pack says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import smelt
from smelt.cli import main
from smelt.kernels.random import drawn, key_of, words
from tests.small_models import llama

SHAPES = {"a.weight": (9, 7), "a.bias": (9,), "conv.weight": (4, 3, 2, 2), "same.weight": (3, 3), "w": (5, 2)}


def pair() -> tuple[Any, Any]:
    draw = np.random.default_rng(0)
    base = {name: draw.standard_normal(shape).astype("f4") for name, shape in SHAPES.items()}
    moved = {name: (value + 0.1 * draw.standard_normal(value.shape)).astype("f4") for name, value in base.items()}
    return base, {**moved, "same.weight": base["same.weight"]}


def read_back(base: Any, pack: Path, scratch: Path) -> Any:
    save_file(base, scratch / "base.safetensors")
    with smelt.load(f"{scratch / 'base.safetensors'}+{pack}") as adapted:
        return dict(adapted)


@pytest.mark.parametrize(
    "options", [{"form": "sparse", "density": 0.3}, {"form": "sparse", "density": 0.3, "prune": "random"},
                {"form": "sign"}, {"form": "sparse", "density": 0.5, "value_dtype": "bfloat16"}],
)  # fmt: skip
def test_the_error_that_is_told_is_that_of_what_is_read_back(options: dict[str, Any], tmp_path: Path) -> None:
    base, model = pair()
    result = smelt.extract_delta(base, model, tmp_path / "out", **options)
    assert smelt.verify(tmp_path / "out").ok
    got = read_back(base, tmp_path / "out", tmp_path)
    for tensor in result.modules:
        missing = np.linalg.norm(model[tensor.module].astype("f8") - got[tensor.module])
        assert tensor.error == pytest.approx(missing, rel=1e-4, abs=1e-6), tensor.module
    assert {tensor.module for tensor in result.modules if tensor.stored == "nothing"} == {"same.weight"}


def test_everything_kept_is_the_fine_tune(tmp_path: Path) -> None:
    base, model = pair()
    smelt.extract_delta(base, model, tmp_path / "out", form="sparse", density=1.0)
    for name, value in read_back(base, tmp_path / "out", tmp_path).items():
        assert value == pytest.approx(model[name], abs=1e-6)


def test_what_is_kept(tmp_path: Path) -> None:
    """The largest as they are; drawn ones divided by the density; signs with the mean magnitude."""
    base, model = pair()
    delta = model["a.weight"] - base["a.weight"]
    for name, options in {
        "top": {"form": "sparse", "density": 0.25}, "dare": {"form": "sparse", "density": 0.25, "prune": "random",
                                                            "seed": 3}, "sign": {"form": "sign"},
    }.items():  # fmt: skip
        smelt.extract_delta(base, model, tmp_path / name, **options)
    top, dare, sign = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("top", "dare", "sign"))
    order = np.sort(np.abs(delta).reshape(-1))[::-1]
    assert np.sort(np.abs(top["a.weight::value"]))[::-1].tolist() == order[: int(0.25 * 63)].tolist()
    places = np.flatnonzero(drawn(words(key_of(3, "a.weight", 0), 0, 63), 0.25))
    assert dare["a.weight::index"].tolist() == places.tolist()
    assert dare["a.weight::value"] == pytest.approx(delta.reshape(-1)[places] * 4)
    assert sign["a.weight::scale"] == pytest.approx(np.abs(delta).mean())
    assert sign["a.weight::sign"].tolist() == np.packbits(delta >= 0).tolist()
    assert sign["a.bias::delta"] == pytest.approx(model["a.bias"] - base["a.bias"])


@pytest.mark.parametrize("options", [{"form": "sparse", "density": 0.4}, {"form": "sign"}])
def test_any_run_of_elements_reads_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    base, model = pair()
    smelt.extract_delta(base, model, tmp_path / "out", **options)
    whole = read_back(base, tmp_path / "out", tmp_path)
    with smelt.load(f"{tmp_path / 'base.safetensors'}+{tmp_path / 'out'}") as adapted:
        for name, value in whole.items():
            for start in range(value.size):
                part = np.empty(min(5, value.size - start), "f4")
                adapted.read(name, start, part)
                assert part.tobytes() == value.reshape(-1)[start : start + 5].tobytes()


def test_what_is_refused(tmp_path: Path) -> None:
    base, model = pair()
    for options, said in (
        ({"form": "sparse"}, "needs density"), ({"form": "sign", "density": 0.5}, "no effect"), ({"form": "x"}, "form"),
        ({"form": "sparse", "density": 0.5, "prune": "x"}, "prune"),
        ({"form": "sparse", "density": 0.5, "value_dtype": "x"}, "value_dtype"),
    ):  # fmt: skip
        with pytest.raises(smelt.UsageError, match=said):
            smelt.extract_delta(base, model, tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(smelt.InputRejected, match="nothing to pack"):
        smelt.extract_delta(base, base, tmp_path / "out", form="sign")
    with pytest.raises(smelt.InputRejected, match=r"'w' is .5, 3. in model and .5, 2. in base"):
        smelt.extract_delta(base, {**model, "w": np.zeros((5, 3), "f4")}, tmp_path / "out", form="sign")
    larger = {**llama(0), **{name: array for name, array in llama(0, 100).items() if len(array) == 100}}
    with pytest.raises(smelt.InputRejected, match=r"embed_tokens.*resize the base first"):
        smelt.extract_delta(llama(0), larger, tmp_path / "out", form="sign")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"w::index": np.array([3, 1], "u4"), "w::value": np.ones(2, "f4")}, "not ascending"),
        ({"w::index": np.array([10], "u4"), "w::value": np.ones(1, "f4")}, "within the 10 elements"),
        ({"w::index": np.array([1], "u4"), "w::value": np.ones(2, "f4")}, "beside values"),
        ({"w::index": np.array([1], "u4")}, "has index, expected"),
        ({"w::sign": np.zeros(1, "u1"), "w::scale": np.ones(1, "f4")}, "is for"),
        ({"w::sign": np.zeros(2, "u1"), "w::scale": np.ones(2, "f4")}, "2 scales"),
        ({"w::delta": np.ones((2, 5), "f4")}, "is for"), ({"x::delta": np.ones(2, "f4")}, "does not have"),
        ({"w::other": np.ones(2, "f4")}, "not understood"),
    ],
)  # fmt: skip
def test_bad_packs(tensors: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    save_file(tensors, tmp_path / "pack" / "adapter_model.safetensors")
    (tmp_path / "pack" / "adapter_config.json").write_text(json.dumps({"peft_type": "SMELT_DELTA"}))
    with pytest.raises(smelt.InputRejected, match=said):
        read_back(pair()[0], tmp_path / "pack", tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, model = pair()
    for name, arrays in (("base", base), ("model", model)):
        save_file(arrays, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / name) for name in ("base.safetensors", "model.safetensors", "out")]
    assert main(["lora", "pack", *paths, "--form", "sparse", "--density", "0.1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {tensor["stored"] for tensor in facts["modules"]} == {"entries", "whole", "nothing"}

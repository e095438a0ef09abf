"""`smelt convert`: the same numbers in another dtype, other shards, and free of pickles."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import smelt
from smelt.cli import main
from smelt.engine.tiles import TILE
from smelt.errors import OperationFailed
from tests.commands import refusal
from tests.pickled import save_arrays
from tests.readback import nothing_left, stored, values
from tests.small_models import CONFIG, TOKENS, bf16, llama, save

#: Halves between neighbours of bfloat16 and float16, and what lies just beside them.
TIES = np.array([1.00390625, 1.01171875, 1.00390626, 1.00390624, 65504.0, 2.0**-24, 3.0e-8, -0.0, 1e-40], np.float32)


@pytest.mark.parametrize(("dtype", "wanted"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_rounding_is_to_nearest_even(dtype: str, wanted: type, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "ties": TIES, "many": random.standard_normal((700, 900)).astype(np.float32),
        "twice": TIES.astype(np.float64) * (1 + 2.0**-40), "codes": np.arange(5),
    }  # fmt: skip
    smelt.convert(arrays, tmp_path / "out", dtype=dtype)
    found = values(tmp_path / "out")
    for name in ("ties", "many"):
        assert found[name].tobytes() == arrays[name].astype(wanted).tobytes(), name
    beyond = np.nextafter(TIES, np.copysign(np.float32(np.inf), TIES))  # no tie in float64 is one after this
    assert found["twice"].tobytes() == np.where(TIES == 0, TIES, beyond).astype(wanted).tobytes()
    np.testing.assert_array_equal(found["codes"], arrays["codes"])


def test_everything_comes_along_from_a_pickled_folder(tmp_path: Path) -> None:
    model = llama(0)
    save(tmp_path / "plain", model, tokens=TOKENS)
    (tmp_path / "plain" / "model.safetensors").rename(tmp_path / "not-here")
    save_arrays(tmp_path / "plain" / "pytorch_model.bin", model)
    command = ["convert", str(tmp_path / "plain"), str(tmp_path / "out"), "--allow-pickle", "--dtype", "float16"]
    assert main([*command, "--shard-size", "60kB", "--quiet"]) == 0
    found = stored(tmp_path / "out")
    assert {name: tensor.data for name, tensor in found.items()} == {
        name: array.astype(np.float16).tobytes() for name, array in model.items()
    }
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "tokenizer.json", "smelt-manifest.json", "model.safetensors.index.json"}
    assert "README.md" not in names
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG | {"torch_dtype": "float16"}
    assert smelt.verify(tmp_path / "out").ok
    manifest = (tmp_path / "out" / "smelt-manifest.json").read_text()
    assert str(tmp_path) not in manifest


def test_without_options_the_bytes_stay(tmp_path: Path) -> None:
    model = {"a.weight": TIES, "b.weight": TIES.astype(np.float16), "c": np.arange(3, dtype=np.int32)}
    for out in ("first", "second"):
        smelt.convert(model, tmp_path / out, threads=1 + (out == "second"))
    assert {name: tensor.data for name, tensor in stored(tmp_path / "first").items()} == {
        name: array.tobytes() for name, array in model.items()
    }
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_what_overflows_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = np.ones((4, 5), np.float32)
    large[1, 2] = large[3, 4] = 65520.0  # half way to what float16 no longer has
    path = save_arrays(tmp_path / "model.bin", {"fine": TIES, "too large": large})
    code, problems = refusal(
        capsys, "convert", path, tmp_path / "out", "--dtype", "float16", "--allow-pickle", "--quiet"
    )
    assert code == 1
    assert "tensor 'too large': 2 results are NaN or Inf in float16, the first at element 7" in problems[0]
    assert nothing_left(tmp_path / "out")
    smelt.convert(path, tmp_path / "out", dtype="bfloat16", allow_pickle=True)


def test_of_a_large_tensor_not_everything_is_counted(tmp_path: Path) -> None:
    """Its tiles are looked at one by one, and the first bad one ends the run."""
    large = np.zeros(TILE + 3, np.float32)
    large[[5, 7, -1]] = 1e9
    with pytest.raises(OperationFailed, match=r"'w': at least 2 results are NaN or Inf in float16, one at element 5:"):
        smelt.convert({"w": large}, tmp_path / "out", dtype="float16", threads=1)
    large[[5, 7, -1]] = np.nan
    with pytest.raises(OperationFailed, match=r"tensor 'w' holds at least 2 NaN or Inf, one at element 5$"):
        smelt.convert({"w": large}, tmp_path / "out", dtype="float16", threads=1)


def test_refusals_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = save(tmp_path / "plain", llama(0))
    assert refusal(capsys, "convert", home, home)[0] == 2
    assert refusal(capsys, "convert", home, f"{home}/below")[0] == 2
    assert refusal(capsys, "convert", tmp_path / "nowhere", tmp_path / "out")[0] == 3
    assert refusal(capsys, "convert", home, tmp_path / "out", "--dtype", "int8")[0] == 2
    assert nothing_left(tmp_path / "out")


def test_a_round_trip_through_gguf(tmp_path: Path) -> None:
    wanted = {name: array.astype(np.float32) for name, array in bf16(llama(1)).items()}
    model = save(tmp_path / "m", bf16(llama(1)), config={**CONFIG, "max_position_embeddings": 2048})
    smelt.convert(model, tmp_path / "gguf", format="gguf", dtype="bfloat16")
    smelt.convert(tmp_path / "gguf", tmp_path / "back", dtype="float32")
    with smelt.load(tmp_path / "back") as back:
        assert {name: back[name].tobytes() for name in back} == {name: a.tobytes() for name, a in wanted.items()}
    assert main(["convert", model, str(tmp_path / "q"), "--format", "gguf", "--dtype", "q8_0", "--quiet"]) == 0
    with smelt.load(tmp_path / "q") as small:
        assert sorted(small) == sorted(wanted)

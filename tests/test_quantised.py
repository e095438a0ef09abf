"""Quantised checkpoints read as the weights that they stand for, bit for bit as the field's libraries read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.checkpoint import Checkpoint, load
from smelt.checkpoint.memory import MemoryCheckpoint
from smelt.checkpoint.quantised import dequantised, planes, turned
from smelt.kernels.dtypes import DTYPES, name_of
from tests.quantised_oracles import ORACLES, RECORDED, missing

FILES = sorted(RECORDED.glob("*.safetensors"))


def recorded(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Stored tensors, quantization_config and expected weights of a recorded case."""
    with load(path, as_stored=True) as file:
        parts: dict[str, dict[str, Any]] = {"stored": {}, "expected": {}}
        for key, values in file.items():
            part, _, name = key.partition("/")
            parts[part][name] = values
        return parts["stored"], json.loads(file.metadata["config"]), parts["expected"]


def opened(stored: dict[str, Any], config: dict[str, Any], dtype: str = "bfloat16") -> Checkpoint:
    checkpoint = MemoryCheckpoint(stored, "quantised")
    checkpoint.config = {"quantization_config": config, "dtype": dtype}
    return dequantised(checkpoint)


def assert_same(found: Checkpoint, expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, values in expected.items():
        info = found.tensors[name]
        assert (info.shape, DTYPES[info.dtype].values) == (values.shape, values.dtype)
        assert found[name].tobytes() == values.tobytes(), name


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_the_bits_of_the_libraries(path: Path) -> None:
    stored, config, expected = recorded(path)
    dtype = name_of(smelt.load(expected).tensors[next(iter(expected))].dtype)
    found = opened(stored, config, dtype)
    assert_same(found, expected)
    assert found.config == {"dtype": dtype}
    assert "quantised weights" in found.notices[-1]


def test_every_scheme_is_recorded() -> None:
    assert {path.stem for path in FILES} == set(ORACLES)


@pytest.mark.parametrize("name", ORACLES)
def test_the_libraries_themselves(name: str, tmp_path: Path) -> None:
    """On weights that were not recorded."""
    if (lacking := missing(name)) is not None:
        pytest.skip(f"{lacking} is not installed")
    torch = pytest.importorskip("torch")
    for seed in (1, 2):
        stored, config, expected = ORACLES[name].make(torch, seed)
        found = opened(stored, config, str(next(iter(expected.values())).dtype).removeprefix("torch."))
        whole = {key: load({key: value})[key] for key, value in expected.items()}
        assert_same(found, whole)


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_any_run_is_a_part_of_the_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where matrices are read in many bands of columns, and turned in many blocks."""
    for module, name in ((turned, "BAND"), (turned, "STRIP"), (planes, "SHORT"), (planes, "CHUNK")):
        monkeypatch.setattr(module, name, 64)
    stored, config, expected = recorded(path)
    found = opened(stored, config, "float32" if path.stem == "ct_int8_asymmetric" else "bfloat16")
    random = np.random.default_rng(0)
    for name, info in found.tensors.items():
        whole = expected[name].reshape(-1).view(DTYPES[info.dtype].storage)
        for _ in range(40):
            start, end = sorted(random.integers(0, info.count + 1, 2))
            out = np.empty(end - start, whole.dtype)
            found.read(name, int(start), out)
            assert (out == whole[start:end]).all(), (start, end)


def test_a_turned_matrix_of_several_bands() -> None:
    """Wider than a band: 64 columns at a time, of which four bands are remembered."""
    random = np.random.default_rng(0)
    words = random.integers(-(2**31), 2**31, (512, 640), np.int32)
    zeros = random.integers(-(2**31), 2**31, (2, 80), np.int32)
    scales = random.random((2, 640)).astype(np.float16)
    stored = {"x.qweight": words, "x.qzeros": zeros, "x.scales": scales}
    found = opened(stored, {"quant_method": "gptq", "bits": 4, "group_size": 2048, "checkpoint_format": "gptq_v2"})
    codes = (words.view(np.uint32)[:, None, :] >> (4 * np.arange(8, dtype=np.uint32))[:, None]) & 15
    points = (zeros.view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
    group = np.arange(4096) // 2048
    values = (codes.reshape(4096, 640).astype(np.float32) - points.reshape(2, 640)[group]) * scales[group].astype("f4")
    assert found["x.weight"].tobytes() == values.astype(np.float16).T.tobytes()


# --- values by formula: what no library at hand writes -----------------------------------------------------

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def random_fp8(*shape: int) -> Any:
    return (np.random.default_rng(1).standard_normal(shape) * 20).astype(DTYPES["F8_E4M3"].values)


def as_bf16(values: Any) -> bytes:
    return bytes(values.astype(DTYPES["BF16"].values).tobytes())


@pytest.mark.parametrize("second", [(), (1,)])
def test_nvfp4_of_modelopt(second: tuple[int, ...]) -> None:
    """The second scale multiplies the first, in float32."""
    random = np.random.default_rng(0)
    packed, scales = random.integers(0, 256, (48, 32), np.uint8), np.abs(random_fp8(48, 4))
    number = np.full(second, 0.0123, np.float32)
    stored = {
        "x.weight": packed, "x.weight_scale": scales, "x.weight_scale_2": number, "x.input_scale": np.float32(3),
    }  # fmt: skip
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(48, 64)
    values = E2M1[codes] * np.repeat(scales.astype(np.float32) * number, 16, 1)
    found = opened(stored, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    assert set(found) == {"x.weight"}
    assert found["x.weight"].tobytes() == as_bf16(values)


@pytest.mark.parametrize(("method", "shape"), [("modelopt", ()), ("fbgemm_fp8", (40, 1)), ("fbgemm_fp8", (1, 24))])
def test_fp8_of_modelopt_and_fbgemm(method: str, shape: tuple[int, ...]) -> None:
    """A scale for the weight, for each row, or for each column."""
    codes = random_fp8(40, 24)
    scales = (np.random.default_rng(2).random(shape) + 0.1).astype(np.float32) * np.ones(shape, np.float32)
    stored = {"x.weight": codes, "x.weight_scale": scales, "x.input_scale_ub": np.ones(1, np.float32)}
    found = opened(stored, {"quant_method": method})
    assert found["x.weight"].tobytes() == as_bf16(codes.astype(np.float32) * scales)


def test_gptq_groups_in_any_order() -> None:
    """``g_idx`` names each input's group, zero points wrap around, and reading begins anywhere."""
    random = np.random.default_rng(3)
    index = random.integers(0, 4, 64).astype(np.int32)
    words, zeros = (random.integers(-(2**31), 2**31, shape, np.int32) for shape in ((16, 40), (4, 10)))
    scales = random.random((4, 40)).astype(np.float16)
    stored = {"x.qweight": words, "x.qzeros": zeros, "x.scales": scales, "x.g_idx": index}
    found = opened(stored, {"quant_method": "gptq", "bits": 8, "group_size": 16, "desc_act": True})
    codes = words.view(np.uint8).reshape(16, 40, 4).transpose(0, 2, 1).reshape(64, 40).astype(np.float32)
    points = ((zeros.view(np.uint8).reshape(4, 40).astype(np.int32) + 1) % 256).astype(np.float32)
    wanted = ((codes - points[index]) * scales.astype(np.float32)[index]).astype(np.float16).T
    assert found["x.weight"].tobytes() == wanted.tobytes()


def test_every_model_holds_memory_of_its_own() -> None:
    """What turned formats remember is planned once per model, not once in all."""
    words, scales = np.zeros((8, 32), np.int32), np.ones((1, 32), np.float16)
    stored = {"x.qweight": words, "x.qzeros": np.zeros((1, 4), np.int32), "x.scales": scales}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    held = []
    for names in ("a", "abc"):
        asked = [{"model": name, "parameters": {"weight": 1}} for name in names]
        models = {name: opened(stored, config) for name in names}
        plan = smelt.plan({"merge_method": "linear", "models": asked}, models=models, raw=True)
        held.append(plan.peak_memory)
    assert held[1] - held[0] >= 2 * turned.HELD

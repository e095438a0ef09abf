"""Results in FP8: codes and scales as the field's conventions have them, and read back as their product."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import smelt
from smelt.cli import main
from smelt.errors import UsageError
from smelt.kernels.float8 import encode, largest, scales_of
from tests.lora_files import factors, save_adapter
from tests.recipes import Family, recipe
from tests.small_models import CONFIG, Arrays, bf16, llama, save

FP8 = ml_dtypes.float8_e4m3fn
WIDE = {**CONFIG, "hidden_size": 192, "intermediate_size": 576}


def wide(seed: int) -> Arrays:
    """Linear layers that blocks of 128 x 128 do not divide, and one that is larger than a tile."""
    random = np.random.default_rng(seed)
    shapes = {
        "self_attn.q_proj": (192, 192), "self_attn.o_proj": (192, 192), "mlp.gate_proj": (576, 192),
        "mlp.up_proj": (576, 192), "mlp.down_proj": (192, 576), "mlp.experts.0.up_proj": (1100, 600),
        "mlp.experts.0.down_proj": (256, 384),
        "mlp.gate": (8, 192), "input_layernorm": (192,),
    }  # fmt: skip
    layers = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in shapes.items()}
    ends = {"model.embed_tokens.weight": (96, 192), "lm_head.weight": (96, 192), "model.norm.weight": (192,)}
    arrays = {
        name: (random.standard_normal(shape) * 10.0 ** random.integers(-4, 2)).astype(np.float32)
        for name, shape in (ends | layers).items()
    }
    arrays["model.layers.0.mlp.up_proj.weight"][:128, :128] = 0
    return bf16(arrays)


def is_linear(name: str) -> bool:
    return "_proj" in name


def in_fp8(weight: Any, size: int | None) -> tuple[Any, Any, Any]:
    """Codes, scales, and their product, as the conventions say it, in numpy."""
    values = weight.astype(np.float32)
    height, width = (size, size) if size else values.shape
    grid = -(-values.shape[0] // height), -(-values.shape[1] // width)
    scales = np.empty(grid, np.float32)
    for i, j in np.ndindex(grid):
        scales[i, j] = np.abs(values[i * height : (i + 1) * height, j * width : (j + 1) * width]).max()
    scales = np.where(scales > 0, scales / np.float32(448), np.float32(1))
    full = np.repeat(np.repeat(scales, height, 0), width, 1)[: values.shape[0], : values.shape[1]]
    codes = np.clip(values / full, -448, 448).astype(FP8)
    return codes, scales, codes.astype(np.float32) * full


def assert_in_fp8(folder: Path, wanted: Arrays, size: int | None, exact: bool = True) -> None:
    """The stored codes and scales, and what is read of them."""
    suffix = "_scale_inv" if size else "_scale"
    linear = [name for name in wanted if is_linear(name)]
    with smelt.load(folder, as_stored=True) as raw, smelt.load(folder) as found:
        assert set(raw) == set(wanted) | {name + suffix for name in linear}
        assert set(found) == set(wanted)
        for name, values in wanted.items():
            if name not in linear:
                assert raw[name].tobytes() == values.astype(ml_dtypes.bfloat16).tobytes(), name
                continue
            codes, scales, product = in_fp8(values, size)
            assert raw[name].tobytes() == codes.tobytes(), name
            assert raw[name + suffix].tobytes() == scales.tobytes(), name
            assert raw[name + suffix].shape == (scales.shape if size else (1,))
            assert found[name].tobytes() == product.astype(ml_dtypes.bfloat16).tobytes(), name


# --- codes ----------------------------------------------------------------------------------------------


def test_every_code_and_every_tie_rounds_as_the_cast_does() -> None:
    codes = np.arange(256, dtype=np.uint8)
    values = np.sort(codes.view(FP8).astype(np.float32)[np.isfinite(codes.view(FP8).astype(np.float32))])
    ties = (values[1:] + values[:-1]) / 2
    either = [np.nextafter(ties, np.float32(way)) for way in (-np.inf, np.inf)]
    random = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    many = np.concatenate([values, ties, *either, random[np.isfinite(random)]])
    out = np.empty(len(many), np.uint8)
    beyond, strange = encode(many, np.ones(1, np.float32), len(many), len(many), out)
    assert out.tobytes() == np.clip(many, -448, 448).astype(FP8).tobytes()
    assert (beyond, strange) == ((np.abs(many) > 464).sum(), 0)
    torch = pytest.importorskip("torch")
    assert (
        out.tobytes()
        == torch.from_numpy(many).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes()
    )


def test_scales_of_nothing_and_of_the_smallest() -> None:
    tiny = np.float32(1e-45)
    values = np.array([0, -0.0, tiny, -tiny, 3, -5], np.float32)
    found = largest(values, 6, 2)
    assert found.tolist() == [0, tiny, 5]
    assert scales_of(found).tolist() == [1, 1, np.float32(5) / np.float32(448)]


# --- whole models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "size"), [("fp8_block", 128), ("fp8_tensor", None)])
def test_a_model_in_fp8(tmp_path: Path, dtype: str, size: int | None) -> None:
    model = wide(0)
    save(tmp_path / "model", model, config=WIDE)
    for out, threads in (("one", 1), ("three", 3)):
        smelt.convert(tmp_path / "model", tmp_path / out, dtype=dtype, threads=threads, shard_size="2MB")
        assert_in_fp8(tmp_path / out, model, size)
        assert smelt.verify(tmp_path / out).ok
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "three" / path.name).read_bytes(), path.name
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    said = config.pop("quantization_config")
    assert config == WIDE
    kept = said["modules_to_not_convert"] if size else said["ignore"]
    assert sorted(kept) == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]


@pytest.mark.parametrize("dtype", ["fp8_block", "fp8_tensor"])
def test_a_merge_rounds_once(family: Family, tmp_path: Path, dtype: str) -> None:
    """From float32, not from the bfloat16 that other tensors are written in."""
    asked = {**recipe("linear", family.models[:2]), "dtype": "bfloat16", "output": {"dtype": dtype}}
    smelt.merge(asked, tmp_path / "out")
    first, second = family.model_arrays[:2]
    means = {name: (first[name].astype("f4") + second[name].astype("f4")) / 2 for name in first}
    assert_in_fp8(tmp_path / "out", means, 128 if dtype == "fp8_block" else None)
    plan = smelt.plan(asked)
    with smelt.load(tmp_path / "out", as_stored=True) as raw:
        assert plan.bytes_written == sum(info.nbytes for info in raw.tensors.values())
    assert {row["dtype"] for row in plan.rows()} == {"F8_E4M3", "BF16"}
    for command in ("inspect", "verify"):
        assert main([command, str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("dtype", ["fp8_block", "fp8_tensor"])
def test_the_libraries_read_it(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    model = wide(1)
    smelt.convert(save(tmp_path / "model", model, config=WIDE), tmp_path / "out", dtype=dtype)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    safe = pytest.importorskip("safetensors.torch").load_file(tmp_path / "out" / "model.safetensors")
    with smelt.load(tmp_path / "out") as found:
        for name in filter(is_linear, model):
            ours = torch.from_numpy(found[name].view(np.uint16).copy()).view(torch.bfloat16)
            assert torch.equal(ours, _read_by_library(torch, safe, name, said)), name


def _read_by_library(torch: Any, stored: dict[str, Any], name: str, said: dict[str, Any]) -> Any:
    if said["quant_method"] == "fp8":
        size, codes, scales = said["weight_block_size"], stored[name], stored[f"{name}_scale_inv"]
        if not any(length % size[0] for length in codes.shape):
            reader = pytest.importorskip("transformers.integrations.finegrained_fp8").Fp8Dequantize(None)
            return reader._dequantize_one(codes, scales, torch.bfloat16)
        place = "compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer"
        reader = pytest.importorskip(place).FP8BlockDequantizer(targets=["Linear"], weight_block_size=tuple(size))
        return reader._create_dequantized_weight(codes, scales)
    pytest.importorskip("compressed_tensors")
    library = import_module("compressed_tensors.quantization")
    base = import_module("compressed_tensors.compressors").BaseCompressor
    config = library.QuantizationConfig.model_validate(said)
    scheme = config.config_groups["group_0"]
    state = {"weight": stored[name], "weight_scale": stored[f"{name}_scale"]}
    return base.get_value_from_registry(said["format"]).decompress(state, scheme)["weight"].to(torch.bfloat16)


# --- the base's scales ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp8_block", "fp8_tensor"])
def test_the_base_s_scales_give_its_codes_again(tmp_path: Path, dtype: str) -> None:
    smelt.convert(save(tmp_path / "model", wide(2), config=WIDE), tmp_path / "base", dtype=dtype)
    with smelt.load(tmp_path / "base", as_stored=True) as raw:
        before = {name: raw[name] for name in raw}
    smelt.convert(tmp_path / "base", tmp_path / "same", dtype=dtype, scales="base", threads=3)
    with smelt.load(tmp_path / "same", as_stored=True) as raw:
        assert {name: raw[name].tobytes() for name in raw} == {n: array.tobytes() for n, array in before.items()}
    # a model that moved a little keeps the grid: codes that did not move stay; what grows too large is told
    with smelt.load(tmp_path / "base") as base:
        moved = {name: base[name] for name in base}
    name = "model.layers.0.self_attn.q_proj.weight"
    moved[name] = moved[name].copy()
    moved[name][3, 5] *= ml_dtypes.bfloat16(1000)
    save(tmp_path / "moved", moved, config=WIDE)
    asked = recipe("task_arithmetic", [str(tmp_path / "moved")], str(tmp_path / "base"))
    made = smelt.merge({**asked, "output": {"dtype": dtype, "scales": "base"}}, tmp_path / "out")
    with smelt.load(tmp_path / "out", as_stored=True) as raw:
        changed = {name: np.argwhere(raw[name] != before[name]).tolist() for name in raw}
    assert {name: where for name, where in changed.items() if where} == {name: [[3, 5]]}
    assert any("1 values in 1 tensors are larger than the base's scales allow" in line for line in made.warnings)


def expanded(scales: Any, shape: tuple[int, ...]) -> Any:
    """A scale for every element, of blocks or of one weight."""
    height, width = (128, 128) if scales.ndim > 1 else shape
    grid = scales.reshape(-(-shape[0] // height), -1)
    return np.repeat(np.repeat(grid, height, 0), width, 1)[: shape[0], : shape[1]]


@pytest.mark.parametrize("dtype", ["fp8_block", "fp8_tensor"])
@pytest.mark.parametrize("how", ["convert", "lora", "linear", "task_arithmetic"])
def test_an_adapter_on_an_fp8_base_keeps_the_grid(tmp_path: Path, dtype: str, how: str) -> None:
    """Only what it changes gets other codes, and those are of the changed values in the base's scales."""
    base = str(smelt.convert(save(tmp_path / "m", wide(2), config=WIDE), tmp_path / "base", dtype=dtype).path)
    parts = {"self_attn.q_proj": (192, 192), "mlp.down_proj": (192, 576)}
    shapes = {f"model.layers.{layer}.{part}": shape for layer in (0, 1) for part, shape in parts.items()}
    tensors = {name: array * np.float32(0.02) for name, array in factors(2, 1, shapes).items()}
    adapter = save_adapter(tmp_path / "adapter", tensors)
    adapted, output = f"{base}+{adapter}", {"dtype": dtype, "scales": "base"}
    if how == "convert":
        smelt.convert(adapted, tmp_path / "out", **output)
    else:
        one = {"model": {"model": {"path": base}, "lora": str(adapter)} if how == "lora" else adapted}
        asked: dict[str, Any] = {"merge_method": "linear" if how == "lora" else how, "output": output}
        asked |= {"base_model": base} if how == "task_arithmetic" else {}
        smelt.merge({**asked, "models": [{**one, "parameters": {"weight": 1}}]}, tmp_path / "out", threads=2)
    with smelt.load(base, as_stored=True) as before, smelt.load(tmp_path / "out", as_stored=True) as after:
        assert sorted(before) == sorted(after)
        moved = {name for name in before if (before[name] != after[name]).any()}  # -0 + 0 is another 0
        assert moved == {f"{name}.weight" for name in shapes}
        for name, values in ((name, smelt.load(adapted)[name]) for name in moved):
            scales = after[f"{name}_scale_inv" if dtype == "fp8_block" else f"{name}_scale"]
            codes = np.clip(values / expanded(scales, values.shape), -448, 448).astype(FP8)
            assert (codes != after[name].view(FP8)).mean() < 1e-3, name  # base + (model - base) rounds, too


# --- mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"dtype": "fp8_block", "format": "gguf"}, "fp8_block is a type of safetensors: say format: safetensors too"),
        ({"dtype": "bfloat16", "scales": "base"}, "scales are of the dtypes fp8_block and fp8_tensor"),
        ({"dtype": "fp8_tensor", "scales": "new"}, "scales must be fresh or base, found 'new'"),
        ({"dtype": "fp8_tensor", "scales": "base"}, "is not quantised: leave scales out"),
        ({"dtype": "fp8", }, "found 'fp8'"),
    ],
)  # fmt: skip
def test_mistakes_of_the_recipe(family: Family, tmp_path: Path, output: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        smelt.merge({**recipe("linear", family.models[:2]), "output": output}, tmp_path / "out")


def test_scales_of_another_kind(tmp_path: Path) -> None:
    smelt.convert(save(tmp_path / "model", wide(2), config=WIDE), tmp_path / "base", dtype="fp8_tensor")
    with pytest.raises(UsageError, match=r"has 1 x 1 scales for tensor .* expected 2 x 5: choose the dtype"):
        smelt.convert(tmp_path / "base", tmp_path / "out", dtype="fp8_block", scales="base")


def test_bare_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"fp8_block needs a model of one folder with its config\.json"):
        smelt.convert(
            {"model.layers.0.mlp.up_proj.weight": np.ones((4, 4), np.float32)}, tmp_path / "out", dtype="fp8_block"
        )
    plain = {"model.embed_tokens.weight": np.ones((4, 4), np.float32)}
    with pytest.raises(UsageError, match="no tensor is the weight of a linear layer"):
        smelt.convert(save(tmp_path / "model", plain), tmp_path / "out", dtype="fp8_block")


@pytest.mark.parametrize("dtype", ["fp8_block", "fp8_tensor"])
def test_what_is_not_finite_is_refused(tmp_path: Path, dtype: str) -> None:
    model = llama(0)
    name = "model.layers.0.mlp.up_proj.weight"
    model[name][2, 2] = np.inf
    save(tmp_path / "model", model)
    for policy, message in (("error", "NaN or Inf"), ("allow", "values that FP8 does not: NaN or Inf")):
        with pytest.raises(smelt.OperationFailed, match=message):
            smelt.convert(tmp_path / "model", tmp_path / "out", dtype=dtype, on_nonfinite=policy)
        assert not (tmp_path / "out").exists()

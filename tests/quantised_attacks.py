"""Quantised checkpoints that are wrong: section D of the bad inputs, but GGUF. All of them lie on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.attacks import FILE, Attack
from tests.small_models import Arrays

FP8 = ml_dtypes.float8_e4m3fn
BLOCK = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def gptq(**changes: Any) -> Arrays:
    stored = {
        "x.qweight": np.zeros((8, 16), np.int32), "x.qzeros": np.full((2, 2), 0x77777777, np.int32),
        "x.scales": np.ones((2, 16), np.float16), "x.g_idx": (np.arange(64) // 32).astype(np.int32),
    }  # fmt: skip
    return {name: array for name, array in (stored | named(changes)).items() if array is not None}


def named(changes: dict[str, Any]) -> dict[str, Any]:
    return {f"x.{name}": array for name, array in changes.items()}


def fp8(**changes: Any) -> Arrays:
    stored = {"x.weight": np.ones((40, 32), FP8), "x.weight_scale_inv": np.ones((3, 2), np.float32)}
    return {name: array for name, array in (stored | named(changes)).items() if array is not None}


def packed(**changes: Any) -> Arrays:
    stored = {
        "x.weight_packed": np.zeros((16, 8), np.int32), "x.weight_scale": np.ones((16, 2), ml_dtypes.bfloat16),
        "x.weight_shape": np.array([16, 64]),
    }  # fmt: skip
    return {name: array for name, array in (stored | named(changes)).items() if array is not None}


def nf4(state: str | None = None, **changes: Any) -> Arrays:
    told = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 64], **changes}
    text = json.dumps(told) if state is None else state
    return {
        "x.weight": np.zeros((256, 1), np.uint8), "x.weight.absmax": np.ones(8, np.float32),
        "x.weight.quant_map": np.ones(16, np.float32),
        "x.weight.quant_state.bitsandbytes__nf4": np.frombuffer(text.encode(), np.uint8),
    }  # fmt: skip


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
NF4 = {"quant_method": "bitsandbytes"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
PACKED = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": INT4}}}
MXFP4 = {"quant_method": "mxfp4"}
EXPERTS = {"x_blocks": np.zeros((1, 4, 2, 16), np.uint8), "x_scales": np.full((1, 4, 2), 127, np.uint8)}

#: (number in the list of bad inputs and what it is, stored tensors, quantization_config, pattern of the message)
BAD: list[tuple[str, Arrays, dict[str, Any], str]] = [
    ("D77-FP8-without-scale", {**fp8(), "y.weight": np.ones((2, 2), FP8)}, BLOCK, "'y.weight'.* has no scale"),
    ("D78-scale-without-weight", {**fp8(), "y.weight_scale_inv": np.ones((1, 1))}, BLOCK, "'y.weight_sc.*not there"),
    ("D79-grid", fp8(weight_scale_inv=np.ones((2, 2), np.float32)), BLOCK, r"\[2, 2\], expected .*\[3, 2\]"),
    ("D79-dtype-of-scales", fp8(weight_scale_inv=np.ones((3, 2), np.int32)), BLOCK, "is I32, expected F32 or"),
    ("D-block-size", fp8(), {**BLOCK, "weight_block_size": [0, 16]}, "block size .*expected two numbers"),
    ("D81-v2-zeros-in-v1", gptq(qzeros=np.full((2, 2), -2004318072, np.int32)), GPTQ, "zero point 9 .* has 8"),
    ("D81-format", gptq(), {**GPTQ, "checkpoint_format": "marlin"}, "'marlin', this version reads gptq and gptq_v2"),
    ("D82-g_idx-beyond", gptq(g_idx=np.full(64, 2, np.int32)), GPTQ, "'x.g_idx'.* names group 2, there are 2"),
    ("D82-g_idx-below", gptq(g_idx=np.full(64, -1, np.int32)), GPTQ, "names group -1"),
    ("D82-length-of-g_idx", gptq(g_idx=np.zeros(60, np.int32)), GPTQ, "which are not 60 codes of 4 bits"),
    ("D-GPTQ-bits", gptq(g_idx=None), {**GPTQ, "bits": 5}, "codes of '5' bits.*2, 3, 4 and 8"),
    ("D-GPTQ-without-scales", gptq(scales=None), GPTQ, "'x.qweight'.* is quantised, and its 'x.scales' is missing"),
    ("D-GPTQ-zeros", gptq(qzeros=np.zeros((2, 3), np.int32)), GPTQ,
     r"'x.qzeros'.* has shape \[2, 3\], expected \[2, 2\]"),
    ("D-GPTQ-groups", gptq(g_idx=None), {**GPTQ, "group_size": 16}, "has 2 groups, expected 4 of 16 in 64 rows"),
    ("D83-AWQ-gemv", {}, {**AWQ, "version": "gemv"}, "AWQ of version 'gemv'.*reads gemm"),
    ("D83-AWQ-bits", {}, {**AWQ, "bits": 8}, "with '8' bits"),
    ("D84-not-JSON", nf4("{"), NF4, "bitsandbytes__nf4.*is not valid JSON"),
    ("D84-a-list", nf4("[]"), NF4, "expected an object"),
    ("D84-blocksize-0", nf4(blocksize=0), NF4, "has blocksize 0, which no nf4 weight has"),
    ("D84-shape", nf4(shape=[8, 65]), NF4, r"has 256 bytes, expected 260 for shape \[8, 65\]"),
    ("D84-shape-of-text", nf4(shape="x"), NF4, "has shape 'x'"),
    ("D84-huge-shape", nf4(shape=[1 << 40, 1 << 40]), NF4, "has 256 bytes, expected"),
    ("D84-dtype", nf4(dtype="int8"), NF4, "has dtype 'int8'"),
    ("D84-absmax", {**nf4(), "x.weight.absmax": np.ones(7, np.float32)}, NF4, r"shape \[7\], expected \[8\]"),
    ("D84-no-absmax", {k: v for k, v in nf4().items() if k != "x.weight.absmax"}, NF4, "absmax' is missing"),
    ("D85-NaN-scale", EXPERTS | {"x_scales": np.full((1, 4, 2), 255, np.uint8)}, MXFP4, "'x_scales'.* 255.*is NaN"),
    ("D-MXFP4-scales", EXPERTS | {"x_scales": np.zeros((1, 4, 3), np.uint8)}, MXFP4, r"expected \[1, 4, 2\]"),
    ("D-MXFP4-without-scales", {"x_blocks": EXPERTS["x_blocks"]}, MXFP4, "its 'x_scales' is missing"),
    ("D-packed-without-shape", packed(weight_shape=None), PACKED, "its 'x.weight_shape' is missing"),
    ("D-packed-width", packed(weight_packed=np.zeros((16, 7), np.int32)), PACKED, "fits 0 of the kinds"),
    ("D-no-kind", packed(), {**PACKED, "config_groups": {}}, "fits 0 of the kinds .*none is given"),
    ("D-packed-zeros", packed(weight_zero_point=np.zeros((3, 2), np.int32)), PACKED, r"\[3, 2\], expected \[2, 2\]"),
    ("D-packed-index", packed(weight_g_idx=np.full(64, 9, np.int32)), PACKED, "names group 9, there are 2"),
    ("D-sparse", packed(), {**PACKED, "format": "marlin-24"}, "of format 'marlin-24', this version reads"),
    ("D-rotated", packed(), {**PACKED, "transform_config": {"a": 1}}, "weights are rotated"),
    ("D-NVFP4-global-scale", packed(weight_packed=np.zeros((16, 8), np.uint8), weight_scale=np.ones((16, 1), FP8),
        weight_global_scale=np.ones(5, np.float32)), PACKED, r"global_scale'.* has shape \[5\]"),
    ("D-8-bit-layout", {"x.weight": np.ones((2, 2), np.int8), "x.SCB": np.ones(2, np.float32),
        "x.weight_format": np.array(1, np.uint8)}, NF4, "rows are tiled"),
    ("D-two-of-one-name", {**gptq(), "x.weight": np.ones((16, 64), np.float16)}, GPTQ, "'x.weight' is there too"),
]  # fmt: skip


def written(folder: Path, stored: Arrays, config: dict[str, Any]) -> Path:
    """A checkpoint of these tensors; one of none has a tensor that is not quantised."""
    save_file({**stored, "x.norm": np.ones(2, np.float32)}, folder / FILE, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def _attack(name: str, stored: Arrays, config: dict[str, Any], pattern: str) -> Attack:
    return Attack(name, lambda folder: written(folder, stored, config), pattern, ("model",))


ATTACKS = [_attack(*row) for row in BAD]

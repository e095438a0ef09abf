"""Matrices of every scheme of quantisation, random and large, for ``benchmarks.reading``."""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt.kernels.dtypes import DTYPES

ROWS, COLUMNS = 4096, 14336
_RANDOM = np.random.default_rng(0)

Case = tuple[dict[str, Any], dict[str, Any]]


def _words(*shape: int) -> Any:
    return _RANDOM.integers(-(2**31), 2**31, shape, np.int32)


def _bytes(*shape: int, dtype: str = "U8") -> Any:
    return DTYPES[dtype].as_values(_RANDOM.integers(0, 120, shape, np.uint8))


def _floats(*shape: int, dtype: str = "BF16") -> Any:
    return _RANDOM.random(shape, np.float32).astype(DTYPES[dtype].values)


def _integers(bits: int, zeros: bool) -> Case:
    kind = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 128}
    stored = {
        "x.weight_packed": _words(ROWS, COLUMNS * bits // 32), "x.weight_scale": _floats(ROWS, COLUMNS // 128),
        "x.weight_shape": np.array([ROWS, COLUMNS]),
    }  # fmt: skip
    if zeros:
        stored["x.weight_zero_point"] = _words(ROWS * bits // 32, COLUMNS // 128)
    return stored, {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": kind}}}


def _gptq(bits: int) -> Case:
    groups = COLUMNS // 128
    index = _RANDOM.permutation(np.arange(COLUMNS) // 128).astype(np.int32)
    stored = {
        "x.qweight": _words(COLUMNS * bits // 32, ROWS), "x.qzeros": _words(groups, ROWS * bits // 32),
        "x.scales": _floats(groups, ROWS, dtype="F16"), "x.g_idx": index,
    }  # fmt: skip
    return stored, {"quant_method": "gptq", "bits": bits, "group_size": 128}


def _awq() -> Case:
    groups = COLUMNS // 128
    stored = {
        "x.qweight": _words(COLUMNS, ROWS // 8), "x.qzeros": _words(groups, ROWS // 8),
        "x.scales": _floats(groups, ROWS, dtype="F16"),
    }  # fmt: skip
    return stored, {"quant_method": "awq", "bits": 4, "group_size": 128}


def _nf4() -> Case:
    count = ROWS * COLUMNS
    state = b'{"quant_type":"nf4","blocksize":64,"dtype":"bfloat16","shape":[4096,14336],"nested_offset":0.1}'
    stored = {
        "x": _bytes(count // 2, 1), "x.absmax": _bytes(count // 64), "x.quant_map": _floats(16, dtype="F32"),
        "x.nested_absmax": _floats(count // 64 // 256, dtype="F32"),
        "x.nested_quant_map": _floats(256, dtype="F32"),
        "x.quant_state.bitsandbytes__nf4": np.frombuffer(state, np.uint8),
    }  # fmt: skip
    return stored, {"quant_method": "bitsandbytes"}


def _fp4(size: int) -> Case:
    stored = {"x.weight_packed": _bytes(ROWS, COLUMNS // 2), "x.weight_scale": _bytes(ROWS, COLUMNS // size)}
    if size == 16:
        stored["x.weight_scale"] = _bytes(ROWS, COLUMNS // size, dtype="F8_E4M3")
        stored["x.weight_global_scale"] = _floats(1, dtype="F32")
    return stored, {"quant_method": "compressed-tensors"}


def cases() -> dict[str, Case]:
    fp8 = {"x.weight": _bytes(ROWS, COLUMNS, dtype="F8_E4M3")}
    blocks = {"x.weight_scale_inv": _floats(ROWS // 128, COLUMNS // 128, dtype="F32")}
    experts = {"x_blocks": _bytes(4, 5760, 90, 16), "x_scales": _bytes(4, 5760, 90)}
    eight = {"x.weight": _bytes(ROWS, COLUMNS, dtype="I8"), "x.SCB": _floats(ROWS, dtype="F32")}
    return {
        "FP8, blocks of 128 x 128": (fp8 | blocks, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        "FP8, per row": (fp8 | {"x.weight_scale": _floats(ROWS, 1)}, {"quant_method": "fbgemm_fp8"}),
        "MXFP8": (fp8 | {"x.weight_scale": _bytes(ROWS, COLUMNS // 32)}, {"quant_method": "fp8"}),
        "INT4, packed, groups of 128": _integers(4, False), "INT4, packed, asymmetric": _integers(4, True),
        "INT8, packed, groups of 128": _integers(8, False), "INT3, packed, groups of 128": _integers(3, False),
        "GPTQ, 4 bits, act-order": _gptq(4), "GPTQ, 3 bits, act-order": _gptq(3), "GPTQ, 8 bits, act-order": _gptq(8),
        "AWQ": _awq(), "NF4, double quantisation": _nf4(),
        "INT8, bitsandbytes": (eight, {"quant_method": "bitsandbytes"}),
        "MXFP4, gpt-oss experts": (experts, {"quant_method": "mxfp4"}), "MXFP4": _fp4(32), "NVFP4": _fp4(16),
    }  # fmt: skip

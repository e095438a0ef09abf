"""Quantised weights as the field's own libraries make and read them: what dequantisation must match bit for bit.

Each maker gives the stored tensors, the quantization_config, and the weights that the library reads from them.
``python -m tests.quantised_oracles`` records one case of each in tests/data/quantised; where a library is missing
its cases are left as they are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "data" / "quantised"
NAME = "model.layers.0.mlp.up_proj"

Tensors = dict[str, Any]


@dataclass(frozen=True)
class Oracle:
    """A maker, and the modules that it needs."""

    make: Callable[[Any, int], tuple[Tensors, dict[str, Any], Tensors]]
    needs: tuple[str, ...]


ORACLES: dict[str, Oracle] = {}


def oracle(name: str, *needs: str, **fixed: Any) -> Callable[..., Any]:
    def register(make: Any) -> Any:
        ORACLES[name] = Oracle(lambda torch, seed: make(torch, seed, **fixed), ("torch", *needs))
        return make

    return register


def weight(torch: Any, seed: int, *shape: int, dtype: str = "bfloat16") -> Any:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.05).to(getattr(torch, dtype))


# --- FP8 ------------------------------------------------------------------------------------------------


def fp8_blocks(torch: Any, w: Any, size: int) -> tuple[Any, Any]:
    """A weight in blocks of ``size``, those at the edges cut short, and the scales that multiply."""
    rows, columns = w.shape
    scales = torch.zeros(-(-rows // size), -(-columns // size))
    codes = torch.zeros(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
            scales[i, j] = w[block].float().abs().max() / 448
            codes[block] = w[block].float() / scales[i, j]
    return codes.to(torch.float8_e4m3fn), scales


@oracle("fp8_block", "transformers", shape=(96, 64))
@oracle("fp8_block_ragged", "compressed_tensors", shape=(72, 80))
def fp8_block(torch: Any, seed: int, shape: tuple[int, int]) -> tuple[Tensors, dict[str, Any], Tensors]:
    codes, scales = fp8_blocks(torch, weight(torch, seed, *shape), 32)
    name = f"{NAME}.weight"
    config = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    if shape[0] % 32:
        module = import_module("compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer")
        reader = module.FP8BlockDequantizer(targets=["Linear"], weight_block_size=(32, 32))
        made = reader._create_dequantized_weight(codes, scales)
    else:
        module = import_module("transformers.integrations.finegrained_fp8")
        made = module.Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    return {name: codes, f"{name}_scale_inv": scales}, config, {name: made}


# --- compressed-tensors ---------------------------------------------------------------------------------


def compressed(
    torch: Any, seed: int, format: str, shape: tuple[int, int] = (48, 96), scales: str = "bfloat16", **arguments: Any
) -> tuple[Tensors, dict[str, Any], Tensors]:
    """A weight quantised and compressed by the library, and what the library decompresses it to."""
    library = import_module("compressed_tensors.quantization")
    base = import_module("compressed_tensors.compressors").BaseCompressor
    observer = import_module("compressed_tensors.quantization.utils.helpers").calculate_qparams
    args = library.QuantizationArgs(**arguments)
    scheme = library.QuantizationScheme(targets=["Linear"], weights=args, format=format)
    w = weight(torch, seed, *shape)
    low, high, extra = _extremes(torch, w, args)
    made = observer(low, high, args, **({"global_scale": extra} if extra is not None else {}))
    state = {"weight": w, "weight_scale": made[0].to(getattr(torch, scales))}
    if not args.symmetric:
        state["weight_zero_point"] = made[1].to(torch.int8)
    if extra is not None:
        state["weight_global_scale"] = extra
    compressor = base.get_value_from_registry(format)
    stored = compressor.compress(state, scheme)
    read = compressor.decompress(dict(stored), scheme)["weight"]
    kind = {"weights": json.loads(args.model_dump_json()), "targets": ["Linear"], "format": format}
    config = {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": kind}}
    return {f"{NAME}.{name}": value for name, value in stored.items()}, config, {f"{NAME}.weight": read}


def _extremes(torch: Any, w: Any, args: Any) -> tuple[Any, Any, Any]:
    """Least and greatest value of what shares a scale, and NVFP4's global scale."""
    strategy = str(getattr(args.strategy, "value", args.strategy))
    if strategy in ("group", "tensor_group"):
        parts = w.float().unflatten(1, (-1, args.group_size))
        low, high = parts.amin(-1), parts.amax(-1)
    elif strategy == "block":
        size = args.block_structure[0]
        parts = w.float().unflatten(0, (-1, size)).unflatten(2, (-1, size))
        low, high = parts.amin((1, 3)), parts.amax((1, 3))
    else:
        low, high = (w.float().amin(1, True), w.float().amax(1, True)) if strategy == "channel" else _ends(w)
    extra = (448 * 6 / w.float().abs().max()).reshape(1) if strategy == "tensor_group" else None
    return low, high, extra


def _ends(w: Any) -> tuple[Any, Any]:
    return w.float().min().reshape(1), w.float().max().reshape(1)


for bits in (2, 3, 4, 5, 8):
    oracle(
        f"ct_pack_{bits}", "compressed_tensors", format="pack-quantized", num_bits=bits, strategy="group", group_size=32
    )(compressed)
for bits in (3, 4):
    oracle(
        f"ct_pack_{bits}_asymmetric", "compressed_tensors", format="pack-quantized", num_bits=bits, strategy="group",
        group_size=32, symmetric=False, shape=(52, 64), scales="float16",
    )(compressed)  # fmt: skip
_ROWS = {"strategy": "channel"}
oracle("ct_pack_channel", "compressed_tensors", format="pack-quantized", num_bits=4, shape=(16, 100), **_ROWS)(
    compressed
)
oracle("ct_int8_channel", "compressed_tensors", format="int-quantized", num_bits=8, **_ROWS)(compressed)
oracle(
    "ct_int8_asymmetric", "compressed_tensors", format="int-quantized", num_bits=8, strategy="group", group_size=32,
    symmetric=False, scales="float32",
)(compressed)  # fmt: skip
_FP8 = {"format": "float-quantized", "num_bits": 8, "type": "float"}
oracle("ct_fp8_tensor", "compressed_tensors", strategy="tensor", **_FP8)(compressed)
oracle("ct_fp8_channel", "compressed_tensors", **_ROWS, **_FP8)(compressed)
oracle("ct_fp8_block", "compressed_tensors", strategy="block", block_structure=[16, 16], **_FP8)(compressed)
oracle(
    "ct_nvfp4", "compressed_tensors", format="nvfp4-pack-quantized", num_bits=4, type="float",
    strategy="tensor_group", group_size=16, scales="float32",
)(compressed)  # fmt: skip
oracle(
    "ct_mxfp4", "compressed_tensors", format="mxfp4-pack-quantized", num_bits=4, type="float", strategy="group",
    group_size=32,
)(compressed)  # fmt: skip
oracle(
    "ct_mxfp8", "compressed_tensors", format="mxfp8-quantized", num_bits=8, type="float", strategy="group",
    group_size=32,
)(compressed)  # fmt: skip


# --- words of 32 bits -----------------------------------------------------------------------------------


@oracle("awq", "compressed_tensors")
def awq(torch: Any, seed: int) -> tuple[Tensors, dict[str, Any], Tensors]:
    """Any words are codes; the library unpacks them, and dequantises as compressed-tensors does."""
    generator = torch.Generator().manual_seed(seed)
    words = lambda *shape: torch.randint(-(2**31), 2**31, shape, generator=generator).int()  # noqa: E731
    stored = {"qweight": words(96, 10), "qzeros": words(3, 10), "scales": weight(torch, seed, 3, 80, dtype="float16")}
    module = import_module("compressed_tensors.entrypoints.convert.converters.autoawq")
    codes, scale, zero = module.AutoAWQConverter(group_size=32)._convert_gemm_module(
        stored["qweight"], stored["scales"], stored["qzeros"]
    )
    library = import_module("compressed_tensors.quantization")
    args = library.QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=False)
    dequantize = import_module("compressed_tensors.quantization.lifecycle.forward").dequantize
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    made = dequantize(codes, scale, zero, args)
    return {f"{NAME}.{name}": value for name, value in stored.items()}, config, {f"{NAME}.weight": made}


for _bits in (2, 3, 4, 8):
    for _version in ("gptq", "gptq_v2"):

        @oracle(f"{_version}_{_bits}", "gptqmodel_dequantiser", bits=_bits, version=_version)
        def gptq(torch: Any, seed: int, bits: int, version: str) -> tuple[Tensors, dict[str, Any], Tensors]:
            """Random words and a shuffled index, read by the functions with which GPTQModel dequantises files."""
            module = import_module("gptqmodel_dequantiser")
            generator = torch.Generator().manual_seed(seed)
            words = lambda *shape: torch.randint(-(2**31), 2**31, shape, generator=generator).int()  # noqa: E731
            rows, columns, groups = 96, 64, 3
            stored = {
                "qweight": words(rows * bits // 32, columns), "qzeros": words(groups, columns * bits // 32),
                "scales": weight(torch, seed, groups, columns, dtype="float16"),
                "g_idx": torch.randint(0, groups, (rows,), generator=generator).int(),
            }  # fmt: skip
            zeros = stored["qzeros"]
            if version == "gptq":
                zeros = module._correct_gptq_v1_qzeros(zeros, bits)
            codes, zeros = module.unpack_rows(stored["qweight"], bits), module.unpack_cols(zeros, bits)
            index = stored["g_idx"].long()
            made = stored["scales"][index] * (codes - zeros[index])
            config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": True, "sym": False}
            named = {f"{NAME}.{name}": value for name, value in stored.items()}
            return named, config | {"checkpoint_format": version}, {f"{NAME}.weight": made.T.contiguous()}


# --- bitsandbytes ---------------------------------------------------------------------------------------


@oracle("bnb_nf4", "bitsandbytes", kind="nf4", shape=(24, 128))
@oracle("bnb_nf4_nested", "bitsandbytes", kind="nf4", nested=True, shape=(320, 64))
@oracle("bnb_fp4_half", "bitsandbytes", kind="fp4", dtype="float16", shape=(24, 96))
@oracle("bnb_nf4_odd", "bitsandbytes", kind="nf4", dtype="float32", shape=(7, 30))
def bnb4(
    torch: Any, seed: int, kind: str, shape: tuple[int, int], nested: bool = False, dtype: str = "bfloat16"
) -> tuple[Tensors, dict[str, Any], Tensors]:
    library = import_module("bitsandbytes.functional")
    w = weight(torch, seed, *shape, dtype=dtype)
    codes, state = library.quantize_4bit(w, quant_type=kind, compress_statistics=nested, blocksize=64)
    name = f"{NAME}.weight"
    stored = {name: codes} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    made = library.dequantize_4bit(codes, state)
    if kind == "fp4":  # the compiled CPU kernel has 1/48 for the code that the map, and the GPU's kernel, give 1/192
        compute = import_module("bitsandbytes.backends.default.ops")._dequantize_4bit_compute
        made = compute(codes.reshape(-1), state.absmax, state.code, 64, w.shape, w.dtype)
    return stored, {"quant_method": "bitsandbytes", "load_in_4bit": True}, {name: made}


@oracle("bnb_int8", "bitsandbytes")
def bnb8(torch: Any, seed: int) -> tuple[Tensors, dict[str, Any], Tensors]:
    library = import_module("bitsandbytes.functional")
    codes, scale, _ = library.int8_vectorwise_quant(weight(torch, seed, 24, 48, dtype="float16"))
    made = library.int8_vectorwise_dequant(codes, scale).to(torch.bfloat16)
    stored = {f"{NAME}.weight": codes, f"{NAME}.SCB": scale, f"{NAME}.weight_format": torch.tensor(0).byte()}
    return stored, {"quant_method": "bitsandbytes", "load_in_8bit": True}, {f"{NAME}.weight": made}


# --- MXFP4 ----------------------------------------------------------------------------------------------


@oracle("mxfp4_experts", "transformers")
def mxfp4(torch: Any, seed: int) -> tuple[Tensors, dict[str, Any], Tensors]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (3, 40, 3, 16), generator=generator).byte()
    scales = torch.randint(100, 140, (3, 40, 3), generator=generator).byte()
    made = import_module("transformers.integrations.mxfp4")._convert_moe_packed_tensors(blocks, scales)
    made = made if made.shape == (3, 96, 40) else made.transpose(1, 2).contiguous()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return stored, {"quant_method": "mxfp4"}, {name: made}


def missing(name: str) -> str | None:
    """The first module that an oracle needs and that cannot be imported."""
    for module in ORACLES[name].needs:
        try:
            _found(module)
        except ImportError:
            return module
    return None


def _found(module: str) -> None:
    if module == "gptqmodel_dequantiser" and module not in sys.modules:
        _load_gptqmodel(module)
    import_module(module)


def _load_gptqmodel(name: str) -> None:
    """Only the functions on words of GPTQModel, whose package needs more than a CPU; its source is on sys.path."""
    place = next((Path(p) / "gptqmodel/utils/model_dequant.py" for p in sys.path if p), Path())
    paths = [Path(p) / "gptqmodel/utils/model_dequant.py" for p in sys.path if p]
    place = next((path for path in paths if path.is_file()), place)
    spec = spec_from_file_location(name, place)
    if spec is None or spec.loader is None or not place.is_file():
        raise ImportError(name)
    text = place.read_text()
    wanted = text[text.index("def unpack_cols") : text.index("def _convert_mimo_shard")]
    module = module_from_spec(spec)
    exec("import torch\nPLANAR_BITS = (5, 6, 7)\nfrom typing import *\n" + wanted, module.__dict__)
    sys.modules[name] = module


def record() -> None:
    """Write one case of each oracle whose library is there."""
    import torch
    from safetensors.torch import save_file

    RECORDED.mkdir(exist_ok=True)
    for name, entry in ORACLES.items():
        if (lacking := missing(name)) is not None:
            print(f"{name}: {lacking} is missing")
            continue
        stored, config, expected = entry.make(torch, 0)
        tensors = {f"stored/{key}": value for key, value in stored.items()}
        tensors |= {f"expected/{key}": value for key, value in expected.items()}
        save_file({key: value.contiguous() for key, value in tensors.items()}, RECORDED / f"{name}.safetensors",
                  {"config": json.dumps(config)})  # fmt: skip
        print(name, {key: str(value.dtype) for key, value in expected.items()})


if __name__ == "__main__":
    record()

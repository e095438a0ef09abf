"""Quantised blocks: the values of the gguf package, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smelt.kernels.blocks import BLOCK_TYPES, pack, unpack

#: Random blocks with small scales, and what gguf 0.19.0 made of them.
RECORDED = np.load(Path(__file__).parent / "data" / "gguf_blocks.npz")


def unpacked(kind: str, blocks: Any) -> Any:
    out = np.empty(blocks.size // BLOCK_TYPES[kind].size * BLOCK_TYPES[kind].elements, np.float32)
    unpack(kind, np.ascontiguousarray(blocks).reshape(-1), out)
    return out


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_values_are_those_recorded(kind: str) -> None:
    found = unpacked(kind, RECORDED[f"{kind}.blocks"])
    assert found.view(np.uint32).tolist() == RECORDED[f"{kind}.values"].view(np.uint32).tolist()


def test_quantising_gives_the_recorded_bytes() -> None:
    values = RECORDED["pack.values"]
    blocks = np.empty(len(values) // 32 * 34, np.uint8)
    assert pack("Q8_0", values, blocks)
    assert blocks.tobytes() == RECORDED["pack.blocks"].tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e7])
def test_what_has_no_scale_is_told(bad: float) -> None:
    """1e7 / 127 is beyond float16."""
    values = np.zeros(64, np.float32)
    values[40] = bad
    assert not pack("Q8_0", values, np.empty(68, np.uint8))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_any_bytes_unpack_as_in_the_gguf_package(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    raw = np.random.default_rng(1).integers(0, 256, (512, BLOCK_TYPES[kind].size), np.uint8)
    with np.errstate(all="ignore"):
        wanted = np.ascontiguousarray(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])).reshape(-1)
    found = unpacked(kind, raw)
    same = found.view(np.uint32) == wanted.view(np.uint32)
    assert (same | (np.isnan(found) & np.isnan(wanted))).all()


def test_any_values_quantise_as_in_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    random = np.random.default_rng(2)
    values = (random.standard_normal((512, 32)) * 10.0 ** random.integers(-9, 5, (512, 1))).astype(np.float32)
    values[:8] = np.arange(-16, 16) * 63.5 / 16  # ties
    blocks = np.empty(512 * 34, np.uint8)
    assert pack("Q8_0", values.reshape(-1), blocks)
    assert blocks.tobytes() == gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0).tobytes()

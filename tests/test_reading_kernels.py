"""The compiled loops that weights go through as they are read, against the same in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smelt.kernels.dequantise import Packing, Scales, dequantise
from smelt.kernels.dtypes import DTYPES
from smelt.kernels.lowrank import add_product
from smelt.kernels.widen import widen

CODES = np.arange(256, dtype=np.float32)
TABLES = {"codes": CODES, "values": np.random.default_rng(9).standard_normal(256, np.float32)}


def packed_along(codes: Any, bits: int, phase: int) -> Any:
    """A string of bits per row, low bits first, and a byte more."""
    rows, columns = codes.shape
    size = -(-(columns * bits + phase) // 8) + 1
    line = np.zeros((rows, 8 * size), np.uint8)
    line[:, phase : phase + columns * bits] = (codes[:, :, None] >> np.arange(bits) & 1).reshape(rows, -1)
    return np.packbits(line, axis=1, bitorder="little")


def packed_down(codes: Any, bits: int, phase: int) -> Any:
    """Words of 32 bits down each column, and a row of words more."""
    words = packed_along(codes.T, bits, phase)
    lacking = -words.shape[1] % 4 + 4
    return np.ascontiguousarray(np.pad(words, ((0, 0), (0, lacking))).view(np.uint32).T)


def stored(values: Any, dtype: str) -> Any:
    return DTYPES[dtype].as_storage(values.astype(DTYPES[dtype].values))


@pytest.mark.parametrize(("bits", "down", "table", "run", "dtype", "turned"), [
    (4, False, "codes", 1, "F16", True), (4, False, "values", 32, "BF16", True), (4, False, "values", 32, "F32", False),
    (4, False, "codes", 5, "BF16", False), (8, False, "values", 5, "F32", True), (4, True, "codes", 1, "F16", True),
    (4, True, "codes", 64, "BF16", False), (3, True, "codes", 1, "F32", True), (8, True, "codes", 5, "BF16", True),
])  # fmt: skip
def test_codes_to_values(bits: int, down: bool, table: str, run: int, dtype: str, turned: bool) -> None:
    random = np.random.default_rng(bits)
    for rows, columns, phase in ((1, 1, 0), (7, 70, 0), (35, 301, bits), (66, 1100, 0)):
        codes = random.integers(0, 1 << bits, (rows, columns), np.uint8)
        packed = (packed_down if down else packed_along)(codes, bits, phase)
        groups = np.arange(columns) // run
        scale = random.standard_normal((3, groups[-1] + 1), np.float32)
        zero = random.integers(0, 9, scale.shape).astype(np.float32) if down else None
        row_group = random.integers(0, 3, rows)
        scales = Scales(scale, row_group.astype(np.uint32), groups.astype(np.uint32), zero, factor=0.3)
        at = np.ix_(row_group, groups)
        wanted = TABLES[table][codes] - (0 if zero is None else zero[at])
        wanted = stored(wanted * scale[at] * np.float32(0.3), dtype)
        out = np.empty((columns, rows) if turned else (rows, columns), DTYPES[dtype].storage)
        dequantise(
            packed.reshape(-1), packed.shape[1], phase, Packing(bits, down), TABLES[table], scales, dtype, out,
            turned=turned,
        )  # fmt: skip
        assert (out == (wanted.T if turned else wanted)).all()


def test_a_product_is_the_sum_in_order_of_any_run() -> None:
    random = np.random.default_rng(0)
    for rows, columns, rank in ((1, 1, 1), (3, 5, 4), (6, 1030, 3), (5, 2100, 16), (4, 130, 70), (3, 64, 300)):
        left, right = (
            random.standard_normal((rows, rank), np.float32),
            random.standard_normal((rank, columns), np.float32),
        )
        total = np.zeros((rows, columns), np.float32)
        for k in range(rank):
            total = total + left[:, k : k + 1] * right[k]
        for _ in range(12):
            start, end = sorted(random.integers(0, rows * columns + 1, 2))
            out = random.standard_normal(end - start, np.float32)
            wanted = out + np.float32(0.7) * total.reshape(-1)[start:end]
            add_product(left, right, 0.7, int(start), out)
            assert (out == wanted).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_number_of_16_bits_is_widened_exactly(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty(len(bits), np.float32)
    widen(bits, dtype, out)
    with np.errstate(invalid="ignore"):
        wanted = DTYPES[dtype].as_values(bits).astype(np.float32)
    assert np.array_equal(out, wanted, equal_nan=True)
    assert (np.signbit(out) == np.signbit(wanted)).all()

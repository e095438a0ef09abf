"""Functions of rows: the same numbers however the rows fall into tiles, and every tile read whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import smelt
from smelt.engine.jobs import Steps
from smelt.engine.operands import CheckpointOperand, Ledger
from smelt.engine.tiles import TILE
from smelt.kernels.broadcast import PerColumn, PerRow
from smelt.kernels.program import ByRow, Call, Output, Rows, Totals, Whole, call
from smelt.methods.tensors import identity

from .running import run

SHAPES = [(), (5,), (3, 7), (1_200_000,), (2000, 700), (3, 700_000), (TILE, 2), (40, 30, 1100)]


def ran(method: Callable[[Any], Steps | Output], values: npt.NDArray[Any], threads: int = 2) -> tuple[Any, Ledger]:
    ledger = Ledger()
    operand = CheckpointOperand(smelt.load({"x": values}, label="model"), "x", ledger)
    return run(method, operand, threads), ledger


def values_of(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def rows(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.reshape(-1, values.shape[-1] if values.shape else 1)


def centred(x: Any) -> Any:
    return x - x.max(axis=1, keepdims=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_by_rows(shape: tuple[int, ...]) -> None:
    values = values_of(shape)
    got, ledger = ran(lambda x: Whole(centred, {"x": x}, by_rows=True), values)
    assert np.array_equal(got, centred(rows(values)).reshape(shape))
    assert ledger.digests("model") == ran(lambda x: call(identity, x=x), values)[1].digests("model")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_per_row_return_as_an_operand(shape: tuple[int, ...]) -> None:
    values = values_of(shape)

    def method(x: Any) -> Steps:
        (largest,) = yield (Rows(lambda x: np.abs(x).max(axis=1), {"x": x}),)
        return call(quotient, x=x, m=PerRow(largest, x.shape))

    expected = rows(values) / np.abs(rows(values)).max(axis=1, keepdims=True)
    assert np.array_equal(ran(method, values)[0], expected.reshape(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_per_column(shape: tuple[int, ...]) -> None:
    values = values_of(shape)

    def method(x: Any) -> Steps:
        (sums,) = yield (Rows(lambda x: np.abs(x).sum(axis=0, dtype=np.float64), {"x": x}, total=True),)
        return call(quotient, x=x, m=PerColumn(sums, x.shape))

    found = ran(method, values)[0]
    expected = rows(values) / np.abs(rows(values)).sum(axis=0, dtype=np.float64).astype(np.float32)
    assert np.allclose(found, expected.reshape(shape), rtol=1e-6, atol=0)
    assert np.array_equal(found, ran(method, values, threads=1)[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("one_row", [False, True])
def test_operands_made_of_rows(shape: tuple[int, ...], one_row: bool) -> None:
    """One made of another, for a sum and for the output; every tile is still read whole."""
    values = values_of(shape)

    def method(x: Any) -> Steps:
        middle = ByRow(centred, {"x": x}, (x.count,) if one_row else x.shape)
        twice = ByRow(doubled, {"x": middle}, middle.shape)
        ((total,),) = yield (Totals((call(one, x=twice),)),)
        return call(shifted, x=x, m=twice, total=total)

    length = values.size if one_row else rows(values).shape[1]
    twice = 2 * centred(values.reshape(-1, length))
    got, ledger = ran(method, values)
    total = np.float32(twice.sum(dtype=np.float64))
    assert np.allclose(got, (rows(values) - twice.reshape(-1, rows(values).shape[1]) + total).reshape(shape), rtol=1e-6)
    assert np.array_equal(got, ran(method, values, threads=1)[0])
    assert ledger.digests("model") == ran(lambda x: call(identity, x=x), values)[1].digests("model")


def test_requests_of_both_kinds_in_one_step() -> None:
    values = values_of((900, 700))

    def method(x: Any) -> Steps:
        largest, (total,) = yield (Rows(lambda x: x.max(axis=1), {"x": x}), Totals((Call(one, {"x": x}),)))
        return call(shifted, x=x, m=PerRow(largest, x.shape), total=total)

    total = np.float32(values.astype(np.float64).sum())
    assert np.allclose(ran(method, values)[0], centred(values) + total, atol=1e-4)


def one(x: Any) -> Any:
    return (x,)


def doubled(x: Any) -> Any:
    return x + x


def quotient(x: Any, m: Any) -> Any:
    return x / m


def shifted(x: Any, m: Any, total: Any) -> Any:
    return x - m + total

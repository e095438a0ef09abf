"""Dicts of numpy and torch arrays as checkpoints: every dtype, every layout, no needless copy."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import smelt
from smelt.kernels.dtypes import DTYPES

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
if find_spec("torch") is not None:
    import torch

WHOLE_BYTES = sorted(code for code, dtype in DTYPES.items() if dtype.bits >= 8)
PARTS = st.lists(st.integers(0, 24), max_size=4).map(lambda cuts: sorted({0, 24, *cuts}))


def numpy_array(code: str) -> Any:
    """24 values of this dtype with varied bits."""
    dtype = DTYPES[code]
    bits = np.arange(24 * np.dtype(dtype.storage).itemsize, dtype=np.uint8)
    return (bits % 2 if code == "BOOL" else bits).view(dtype.values).reshape(2, 3, 4)


def torch_array(code: str) -> Any:
    flat = numpy_array(code).reshape(-1)
    return torch.from_numpy(flat.view(np.uint8).copy()).view(getattr(torch, DTYPES[code].value_type)).reshape(2, 3, 4)


MAKERS = [numpy_array, pytest.param(torch_array, marks=needs_torch)]


def read_in_parts(checkpoint: smelt.Checkpoint, name: str, cuts: list[int]) -> bytes:
    storage = DTYPES[checkpoint.tensors[name].dtype].storage
    found = b""
    for start, stop in pairwise(cuts):
        out = np.empty(stop - start, storage)
        checkpoint.read(name, start, out)
        found += out.tobytes()
    return found


@pytest.mark.parametrize("make", MAKERS)
@given(code=st.sampled_from(WHOLE_BYTES), cuts=PARTS)
def test_every_dtype_in_any_parts(make: Any, code: str, cuts: list[int]) -> None:
    checkpoint = smelt.load({"w": make(code)})
    info = checkpoint.tensors["w"]
    assert (info.name, info.dtype, info.shape, info.file) == ("w", code, (2, 3, 4), "")
    assert read_in_parts(checkpoint, "w", cuts) == numpy_array(code).tobytes()
    assert checkpoint["w"].dtype == DTYPES[code].values
    assert checkpoint.kind == ("numpy" if make is numpy_array else "torch")  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("code", WHOLE_BYTES)
def test_any_memory_layout(make: Any, code: str) -> None:
    array = make(code)
    expected = numpy_array(code)
    views = {
        "reversed": array.swapaxes(0, 2),
        "strided": array[:, ::2, 1::2],
        "empty": array[:0],
        "single": array[0, 0, 0],
    }
    checkpoint = smelt.load(views)
    bits = DTYPES[code].storage
    for name, view in {
        "reversed": expected.swapaxes(0, 2), "strided": expected[:, ::2, 1::2], "empty": expected[:0],
        "single": expected[0, 0, 0],
    }.items():  # fmt: skip
        view = np.asarray(view)
        found = checkpoint[name]
        assert found.shape == view.shape
        assert np.array_equal(np.atleast_1d(found).view(bits), np.atleast_1d(np.ascontiguousarray(view)).view(bits))


def test_other_byte_orders_are_turned() -> None:
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    assert np.array_equal(smelt.load({"w": array})["w"], array)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("code", ["F32", "BF16", "I64"])
def test_contiguous_arrays_are_not_copied(make: Any, code: str) -> None:
    """What the caller changes later is what is read."""
    array = make(code).reshape(-1)[:8]
    array[:] = 0
    checkpoint = smelt.load({"w": array})
    array[3] = 1
    assert checkpoint["w"].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


@needs_torch
def test_torch_views_are_resolved() -> None:
    complexes = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    negative = complexes.conj().imag
    checkpoint = smelt.load(
        {"conjugate": complexes.conj(), "negative": negative, "tracked": torch.ones(2, requires_grad=True)}
    )
    assert checkpoint["conjugate"].tolist() == [1 - 2j, 3 + 4j]
    assert checkpoint["negative"].tolist() == [-2, 4]
    assert checkpoint["tracked"].tolist() == [1, 1]


@needs_torch
def test_parameters_and_subclasses_are_tensors() -> None:
    class Marked(torch.Tensor):  # type: ignore[misc]
        pass

    arrays = {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.ones(2).as_subclass(Marked)}
    checkpoint = smelt.load(arrays)
    assert checkpoint.kind == "torch"  # type: ignore[attr-defined]
    assert [array.tolist() for array in checkpoint.values()] == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("array", "pattern"),
    [
        ([1.0], "is a list, expected a numpy or torch array"),
        (np.array(["a"]), "has dtype <U1, which checkpoints cannot hold"),
        (np.zeros(2, np.complex128), "has dtype complex128, which"),
        (np.zeros(2, ml_dtypes.int4), "has dtype int4, which"),
    ],
)
def test_values_that_no_file_can_hold(array: Any, pattern: str) -> None:
    with pytest.raises(smelt.InputRejected, match=f"^mine: tensor 'w' {pattern}"):
        smelt.load({"w": array}, label="mine")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("", "'': the name is empty"),
        ("a\nb", r"'a\\nb': the name holds characters that cannot be printed"),
        (1, "'1': the name is no text"),
    ],
)
def test_names_that_no_file_can_hold(name: Any, pattern: str) -> None:
    with pytest.raises(smelt.InputRejected, match=f"^mine: tensor {pattern}"):
        smelt.load({name: np.zeros(2)}, label="mine")


@needs_torch
def test_torch_tensors_that_no_file_can_hold() -> None:
    wrong = {
        "has dtype complex128, which": torch.zeros(2, dtype=torch.complex128),
        "is a sparse, quantised or meta tensor": torch.zeros(2, 2).to_sparse(),
        "is a sparse, quantised or meta tensor, expected plain": torch.zeros(2, device="meta"),
    }
    for pattern, array in wrong.items():
        with pytest.raises(smelt.InputRejected, match=f"^mine: tensor 'w' {pattern}"):
            smelt.load({"w": array}, label="mine")


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("start", "count"), [(-1, 1), (23, 2), (25, 1)])
def test_a_slab_outside_of_the_tensor_is_a_mistake(make: Any, start: int, count: int) -> None:
    with pytest.raises(ValueError, match="outside of the tensor"):
        smelt.load({"w": make("F32")}).read("w", start, np.empty(count, np.float32))


def test_names_are_sorted_and_the_rest_is_empty() -> None:
    checkpoint = smelt.load({"b": np.zeros(1), "a": np.zeros(1)})
    assert list(checkpoint) == ["a", "b"]
    assert (checkpoint.config, checkpoint.metadata, checkpoint.files()) == ({}, {}, [])
    assert (checkpoint.folder, checkpoint.revision) == (None, None)
    checkpoint.check_unchanged()
    checkpoint.close()


def test_numpy_needs_no_torch() -> None:
    program = (
        "import sys, numpy, smelt\n"
        "assert smelt.load({'w': numpy.ones(3)})['w'].sum() == 3\n"
        "assert not {'torch', 'huggingface_hub', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

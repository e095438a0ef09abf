"""Small in-memory models of odd shapes, and how two results are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.small_models import Arrays

SHAPES: dict[str, tuple[int, ...]] = {"scalar": (), "empty": (0,), "one": (1,), "row": (7,), "matrix": (65, 33)}


def model(seed: int, dtype: Any = np.float32, scale: float = 0.1) -> Arrays:
    """Model 0 is the base, any other a fine-tune of it."""
    drawn = {name: np.random.default_rng(len(name)).standard_normal(shape) for name, shape in SHAPES.items()}
    noise = np.random.default_rng(1000 + seed)
    return {
        name: np.asarray(array + (scale * noise.standard_normal(array.shape) if seed else 0)).astype(dtype)
        for name, array in drawn.items()
    }


BASE, X, Y, Z = (model(seed) for seed in range(4))


def bits(arrays: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(a.dtype), tuple(a.shape), a.tobytes()) for name, a in arrays.items()}


def assert_close(first: Arrays, second: Arrays, ulps: float = 4) -> None:
    """Equal but for a few roundings of numbers of size about one."""
    assert first.keys() == second.keys()
    for name, a in first.items():
        np.testing.assert_allclose(a, second[name], rtol=0, atol=ulps * 2.0**-22, err_msg=name)

"""Random models and random recipes against a merge in forty lines of float64.

All values lie on a coarse grid, so that task vectors, votes and weighted sums are exact in float32 as well:
what is compared is the logic, ties and cancellations included, and one rounding at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import smelt
from smelt.engine import journal
from smelt.errors import OperationFailed
from tests.faults.checker import files_of
from tests.readback import nothing_left, stored
from tests.recipes import recipe, save_shards
from tests.small_models import Arrays, save
from tests.test_resume import Stopping

TYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}

#: What the base (first) and the models are stored in, and the recipe's dtype keys. Few, since each compiles.
STORAGE: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("BF16", "BF16", "BF16"), {}),
    (("F32", "F32", "F32"), {}),
    (("F16", "F32", "BF16"), {"out_dtype": "bfloat16"}),
    (("BF16", "BF16", "BF16", "BF16", "BF16"), {"dtype": "float16"}),
]

#: Half a step of the significand, with room for the float32 roundings before it.
ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-21, "F64": 2.0**-48}

NAMES = ["model.layers.0.mlp.up_proj.weight", "model.layers.10.norm.weight", "w", "poids.é", "a b/c", "0", "h.1.x"]


@dataclass
class Zoo:
    """A base and models, how they lie on disk, and what to do with them."""

    models: list[Arrays]
    codes: tuple[str, ...]
    parts: list[int]
    method: str
    weights: list[float]
    densities: list[float]
    shared: dict[str, Any]
    keys: dict[str, Any]
    threads: int
    shard_size: int
    stop: int  # bytes after which a run is stopped, to be continued


@st.composite
def zoos(draw: st.DrawFn, method: str) -> Zoo:
    codes, keys = draw(st.sampled_from(STORAGE))
    if method == "passthrough":
        codes = codes[:2]
    sides = st.lists(st.sampled_from([0, 1, 3, 8, 17]), max_size=3)
    shapes = {"always": [5, 9], **draw(st.dictionaries(st.sampled_from(NAMES), sides, max_size=5))}
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = len(codes) - 1
    quarters = st.integers(-8, 8).map(lambda quarter: quarter / 4)
    return Zoo(
        models=[{name: grid(random, shape).astype(TYPES[code]) for name, shape in shapes.items()} for code in codes],
        codes=codes,
        parts=[draw(st.integers(1, 3)) for _ in codes],
        method=method,
        weights=draw(st.lists(quarters, min_size=count, max_size=count)),
        densities=draw(st.lists(st.sampled_from([1.0, 0.5, 0.25, 0.01]), min_size=count, max_size=count)),
        shared={"lambda": draw(st.sampled_from([1.0, 0.5])), "normalize": draw(st.booleans())},
        keys=keys,
        threads=draw(st.sampled_from([1, 2, 4])),
        shard_size=draw(st.sampled_from([1, 100, 10**9])),
        stop=draw(st.integers(0, 5000)),
    )


def grid(random: np.random.Generator, shape: list[int]) -> npt.NDArray[np.float64]:
    """Multiples of 1/4 between -2 and 2: few, so that equal magnitudes and even votes are common."""
    return np.asarray(random.integers(-8, 9, shape) / 4)


# --- the oracle -----------------------------------------------------------------------------------------


Array = npt.NDArray[np.float64]


def oracle(zoo: Zoo, name: str) -> Array:
    """The merged tensor."""
    base, *models = (arrays[name].astype(np.float64) for arrays in zoo.models)
    weights, scale = zoo.weights, zoo.shared["lambda"]
    mass = sum(weights) if zoo.shared["normalize"] else 1.0
    if zoo.method == "passthrough":
        return weights[0] * models[0]
    if zoo.method == "linear":
        return np.asarray(sum(weight * model for weight, model in zip(weights, models, strict=True)) / mass)
    taus = [model - base for model in models]
    if zoo.method == "task_arithmetic":
        total = sum(weight * tau for weight, tau in zip(weights, taus, strict=True))
        return np.asarray(base + scale * total / (mass or 1.0))
    values = [w * trimmed(tau, d) for w, tau, d in zip(weights, taus, zoo.densities, strict=True)]
    elected = np.where(sum(values) >= 0, 1, -1)
    agree = [value * elected > 0 for value in values]
    total = sum(np.where(agrees, value, 0) for agrees, value in zip(agree, values, strict=True))
    share = sum(np.where(agrees, weight, 0) for agrees, weight in zip(agree, weights, strict=True))
    return np.asarray(base + scale * total / (np.where(share == 0, 1, share) if zoo.shared["normalize"] else 1.0))


def trimmed(tau: Array, density: float) -> Array:
    """The largest share, the first of equal magnitudes before the next."""
    flat = tau.reshape(-1)
    keep = np.argsort(-np.abs(flat), kind="stable")[: max(1, int(density * flat.size))]
    out = np.zeros_like(flat)
    out[keep] = flat[keep]
    return out.reshape(tau.shape)


# --- the comparison -------------------------------------------------------------------------------------


def tree_of(zoo: Zoo, folder: Path) -> dict[str, Any]:
    """Write the models and give the recipe."""
    paths = [write(folder / f"model{i}", *each) for i, each in enumerate(zip(zoo.models, zoo.parts, strict=True))]
    base = None if zoo.method in ("linear", "passthrough") else paths[0]
    shared = {"linear": ["normalize"], "passthrough": []}.get(zoo.method, ["lambda", "normalize"])
    tree = recipe(zoo.method, paths[1:], base, parameters={name: zoo.shared[name] for name in shared}, **zoo.keys)
    for entry, weight, density in zip(tree["models"], zoo.weights, zoo.densities, strict=True):
        entry["parameters"] = {"scale": weight} if zoo.method == "passthrough" else {"weight": weight}
        if zoo.method == "ties":
            entry["parameters"]["density"] = density
    return tree


def write(folder: Path, arrays: Arrays, parts: int) -> str:
    names = sorted(arrays)
    split = [{name: arrays[name] for name in names[i::parts]} for i in range(parts)]
    filled = [part for part in split if part]
    return save_shards(folder, filled, config={}) if len(filled) > 1 else save(folder, arrays, config={})


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "passthrough"])
@settings(max_examples=int(os.environ.get("SMELT_EXAMPLES", "20")), suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_merge_is_what_the_formula_says(method: str, data: st.DataObject) -> None:
    zoo = data.draw(zoos(method))
    folder = Path(tempfile.mkdtemp())
    try:
        tree, out = tree_of(zoo, folder), folder / "out"
        options: dict[str, Any] = {"force": True, "threads": zoo.threads, "shard_size": zoo.shard_size}
        if impossible(zoo):
            with pytest.raises(smelt.UsageError, match="sum to zero"):
                smelt.merge(tree, out, **options)
            assert nothing_left(out)
        else:
            smelt.merge(tree, out, **options)
            compare(zoo, out)
            assert smelt.verify(out).ok
            assert files_of(continued(zoo, tree, folder / "again", options)) == files_of(out)
    finally:
        shutil.rmtree(folder)


def continued(zoo: Zoo, tree: dict[str, Any], home: Path, options: dict[str, Any]) -> Path:
    """The same merge, stopped somewhere, with other threads then."""
    home.mkdir()
    with mock.patch.object(journal, "INTERVAL", 1):
        with contextlib.suppress(OperationFailed):
            smelt.merge(tree, home / "out", progress=Stopping(zoo.stop), resume=True, **options)
            shutil.rmtree(home / "out")
        return smelt.merge(tree, home / "out", **{**options, "threads": 5 - zoo.threads}).path


def impossible(zoo: Zoo) -> bool:
    """Whether a mean is asked for by weights that cancel."""
    return zoo.method == "linear" and zoo.shared["normalize"] and not sum(zoo.weights)


def compare(zoo: Zoo, out: Path) -> None:
    found = stored(out)
    assert found.keys() == zoo.models[0].keys()
    for name, tensor in found.items():
        wanted = oracle(zoo, name)
        assert tensor.shape == zoo.models[0][name].shape
        assert tensor.dtype == written(zoo)
        error = np.abs(tensor.values.astype(np.float64) - wanted)
        # A sum that cancels keeps the rounding of its parts.
        assert (error <= ROUNDING[tensor.dtype] * np.abs(wanted) + 2.0**-18).all(), name


def written(zoo: Zoo) -> str:
    """The dtype that the recipe names, else the smallest that holds all inputs."""
    named = {"bfloat16": "BF16", "float16": "F16"}.get(zoo.keys.get("out_dtype") or zoo.keys.get("dtype", ""))
    codes = set(zoo.codes[1:] if zoo.method in ("linear", "passthrough") else zoo.codes)
    return named or (codes.pop() if len(codes) == 1 else "F32")

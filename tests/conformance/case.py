"""A golden case as a runner sees it: its inputs, its parameters, and how a result is judged.

Only names are adapted here and in the runners: every formula lives in smelt.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import smelt

Arrays = dict[str, Any]

#: Runs one case: the inputs and the case's ``parameters`` give the tensors that ``expected.safetensors`` holds.
Runner = Callable[["Inputs", dict[str, Any]], Arrays]


class Mismatch(Exception):
    """A case came out wrong, or cannot be run: the message says why."""


class Inputs:
    """The tensors of a case by what they are.

    ``case`` is case.json, for what a case says beside its parameters; ``expected`` the names of what it expects.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.case: dict[str, Any] = json.loads((folder / "case.json").read_text())
        self.base: Arrays = {}
        self.data: Arrays = {}
        self._numbered: dict[str, dict[int, Any]] = {
            "model": defaultdict(dict), "mask": defaultdict(dict), "stats": defaultdict(lambda: defaultdict(dict)),
        }  # fmt: skip
        self.expected = tuple(smelt.load(folder / "expected.safetensors"))
        tensors = smelt.load(folder / "inputs.safetensors")
        for name in tensors:
            self._sort(name, tensors[name])

    def _sort(self, name: str, array: Any) -> None:
        head, _, rest = name.partition("/")
        kind, _, number = head.partition(".")
        if head == "base":
            self.base[rest] = array
        elif kind in ("model", "mask") and number.isdigit():
            self._numbered[kind][int(number)][rest] = array
        elif kind == "stats" and number.isdigit():
            statistic, _, tensor = rest.partition("/")
            self._numbered["stats"][int(number)][statistic][tensor] = array
        else:
            self.data[name] = array

    def each(self, kind: str) -> list[Any]:
        found = self._numbered[kind]
        return [found[index] for index in sorted(found)]


def named(inputs: Inputs, kind: str) -> Arrays:
    """The tensors below ``data/<kind>/``."""
    prefix = f"data/{kind}/"
    return {name[len(prefix) :]: array for name, array in inputs.data.items() if name.startswith(prefix)}


# --- from the spelling of a case to that of ``merge_tensors`` ---------------------------------------------

IGNORED = {"variant", "mergekit_method"}
PER_MODEL = {"weight", "weights", "density", "drop_rate", "gamma", "epsilon", "coefficients"}


def arguments(parameters: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of ``merge_tensors`` that any case may set."""
    shared: dict[str, Any] = {}
    per_model: dict[str, list[Any]] = {}
    out: dict[str, Any] = {"parameters": shared, "per_model": per_model}
    if parameters.get("variant") == "mergekit":
        shared["variant"] = "mergekit"
    for name, value in parameters.items():
        if name in IGNORED or value is None:
            continue
        if name == "dtype":
            out[name] = value
        elif name in PER_MODEL and isinstance(value, list):
            per_model[name.rstrip("s") if name != "drop_rate" else name] = value
        else:
            shared[name] = value
    return out


def with_base(method: str) -> Runner:
    def run(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
        return smelt.merge_tensors(
            method, inputs.each("model"), inputs.base, masks=inputs.each("mask") or None, **arguments(parameters)
        )

    return run


# --- comparing -------------------------------------------------------------------------------------------


def boundary(case: dict[str, Any]) -> int:
    """How many elements of masks, and of what is made with them, the notes say may fall on either side."""
    said = re.search(r"(\d+) positions lie within \S+ of the decision boundary", case.get("notes", ""))
    return int(said[1]) if said else 0


def compare(result: Arrays, expected: Arrays, tolerance: dict[str, float], undecided: int = 0) -> None:
    """Same names, shapes, dtypes, and |a - b| <= atol + rtol |b| everywhere.

    Up to ``undecided`` elements may differ in all masks together, and as many in all tasks' models.
    """
    left = {"mask": undecided, "task": undecided}
    if set(result) != set(expected):
        raise Mismatch(f"names differ: {sorted(set(result) ^ set(expected))[:5]}")
    worst = ("", 0.0, 0.0)
    for name, wanted in expected.items():
        got = result[name]
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            raise Mismatch(f"{name}: {got.dtype}{got.shape}, expected {wanted.dtype}{wanted.shape}")
        a, b = got.astype(np.float64), wanted.astype(np.float64)
        excess = np.abs(a - b) - (tolerance["atol"] + tolerance["rtol"] * np.abs(b))
        kind = name.partition(".")[0]
        if kind in left and (apart := int((excess > 0).sum())) <= left[kind] and np.isfinite(a).all():
            left[kind] -= apart
        elif excess.size and not excess.max() <= worst[1]:
            worst = (name, float(excess.max()), float(np.abs(a - b).max()))
    if worst[0]:
        raise Mismatch(f"{worst[0]}: error {worst[2]:.3g} exceeds {tolerance}")

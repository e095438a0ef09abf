"""Methods on the singular vectors of task matrices."""

from __future__ import annotations

from typing import Any

import numpy as np

import smelt

from ..case import Arrays, Inputs, Mismatch, arguments

#: What the reference calls a variant is an option here; its eigen variant is the same in exact arithmetic.
TSV = {
    "tsvm": {},
    "tsvm_eigen": {},
    "tsvm_lossless": {"rank_fraction": 1.0},
    "rank_reduction": {"orthogonalise": False},
}


def tsv(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    given = dict(parameters)
    variant = given.pop("variant", "tsvm")
    if variant == "tsvc":
        return compressed(inputs, given)
    if variant not in TSV:
        raise Mismatch(f"unknown variant {variant!r}")
    options = arguments({**given, **TSV[variant]})
    return smelt.merge_tensors("tsv", inputs.each("model"), inputs.base, **options)


def compressed(inputs: Inputs, given: dict[str, Any]) -> Arrays:
    """Every task's vector (its model on a base of zeros) and singular values."""
    options = arguments({"rank_fraction" if name == "sv_reduction" else name: value for name, value in given.items()})
    made = smelt.merge_tensors("tsv", inputs.each("model"), inputs.base, parts=True, **options)
    zeros = {name: np.zeros_like(array) for name, array in inputs.base.items()}
    found = {}
    for task in range(len(inputs.each("model"))):
        vectors = smelt.restore_task(made, zeros, task)
        found |= {f"delta.{task}/{name}": vectors[name] for name in zeros}
    for name, array in made.items():
        kind, _, tensor = name.partition("/")
        if kind.startswith("factors."):
            found[f"s.{kind[8:]}/{tensor}"] = array[:, len(zeros[tensor])]
    return found


def iso(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    options = arguments(parameters)
    options["parameters"]["variant"] = parameters["variant"]
    return smelt.merge_tensors("iso", inputs.each("model"), inputs.base, **options)


RUNNERS = {"tsv": tsv, "iso": iso}

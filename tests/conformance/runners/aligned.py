"""KnOTS: the cases give LoRA factors, the merge takes models."""

from __future__ import annotations

from typing import Any

import numpy as np

import smelt

from ..case import Arrays, Inputs, Mismatch


def knots(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    given = dict(parameters)
    if given.pop("sign_resolve_mode", "sum_of_values") != "sum_of_values":
        raise Mismatch(f"sign_resolve_mode {parameters['sign_resolve_mode']!r} is not known")
    scopes = {"whole model, per task": "model"}
    options = {
        "rule": given.pop("merge_method"), "merge_func": given.pop("merging_type", "mean"),
        "density": given.pop("topK", 20) / 100, "alpha": given.pop("scaling_coeff", 1.0),
        "shared": "output" if given.pop("concat_across_output", True) else "input",
        "scope": scopes[given.pop("threshold_scope", "whole model, per task")],
    }  # fmt: skip
    scaling = given.pop("lora_scaling", 1.0)
    if given:
        raise Mismatch(f"unknown parameters: {sorted(given)}")
    base = {name: array.astype(np.float64) for name, array in inputs.base.items()}
    models = [folded(base, factors, scaling) for factors in inputs.each("model")]
    return smelt.merge_tensors("knots", models, base, parameters=options, dtype="float32")


def folded(base: Arrays, factors: Arrays, scaling: float) -> Arrays:
    """The model that an adapter makes of its base, in fp64 so that nothing is lost."""
    model = dict(base)
    for name, inner in factors.items():
        module, _, part = name.partition(".lora_")
        if part == "A.weight":
            outer = factors[f"{module}.lora_B.weight"].astype(np.float64)
            model[f"{module}.weight"] = base[f"{module}.weight"] + scaling * (outer @ inner.astype(np.float64))
    return model


RUNNERS = {"knots": knots}

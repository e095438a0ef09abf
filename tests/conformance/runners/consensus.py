"""Methods that weigh the models by what they changed: SCE, VaRM, PCB-Merging."""

from __future__ import annotations

from typing import Any

import smelt

from ..case import Arrays, Inputs, Mismatch, arguments


def sce(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    return smelt.merge_tensors("sce", inputs.each("model"), inputs.base, **flavoured(parameters))


def varm(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    """Cases say no variant: all come from the authors' code."""
    given = {"variant": "reference", **parameters}
    if given.pop("compute_dtype", "float32") != "float32":
        raise Mismatch("only float32 is computed in")
    if not given.get("use_softmax"):
        given.pop("temperature", None)
    if given["granularity"] == "element":
        given.pop("use_softmax", None)
    return smelt.merge_tensors("varm", inputs.each("model"), inputs.base, **flavoured(given))


def pcb(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    """The merged model, and each model's final scores where the case has them."""
    models, options = inputs.each("model"), flavoured(parameters)
    factors = options["parameters"].pop("lambda")
    options["per_model"]["lambda"] = factors if isinstance(factors, list) else [factors] * len(models)
    out = smelt.merge_tensors("pcb", models, inputs.base, **options)
    if any(name.startswith("scale.") for name in inputs.expected):
        for index in range(len(models)):
            options["parameters"]["scale_of"] = index
            scales = smelt.merge_tensors("pcb", models, inputs.base, **options)
            out |= {f"scale.{index}/{name}": array for name, array in scales.items()}
    return out


def flavoured(parameters: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``merge_tensors``, with whatever variant the case names."""
    options = arguments(parameters)
    if "variant" in parameters:
        options["parameters"]["variant"] = parameters["variant"]
    return options


RUNNERS = {"pcb": pcb, "sce": sce, "varm": varm}

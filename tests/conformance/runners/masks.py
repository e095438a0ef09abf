"""TALL masks, consensus merging, EMR-Merging: results in parts."""

from __future__ import annotations

from typing import Any

import numpy as np

import smelt

from ..case import Arrays, Inputs, Mismatch, arguments

VECTORS = {"sum": "sum", "ties_sum_k20": "ties_sum"}


def tall_masks(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    if "lambda_grid" in parameters:
        return selected(inputs, parameters)
    if parameters.get("output", "compressed") != "compressed":
        raise Mismatch(f"unknown output {parameters['output']!r}")
    options = masking(parameters, "output")
    return {**parts_of(inputs, "tall_masks", options, "multi"), **task_models(inputs, "tall_masks", options)}


def selected(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    """Each task's lambda by validation accuracy, and the authors' file: one line of bits over sorted names."""
    if parameters.get("select") != "best_validation":
        raise Mismatch(f"unknown select {parameters.get('select')!r}")
    options = masking(parameters, "lambda_grid", "select")
    scores = [iter(column) for column in inputs.data["data/accuracy"].T]
    chosen = smelt.choose_lambdas(
        inputs.each("model"), inputs.base, lambda task, model: next(scores[task]),
        grid=parameters["lambda_grid"], **options,
    )  # fmt: skip
    made = parts_of(inputs, "tall_masks", {**options, "per_model": {"lambda": chosen}}, "multi")
    masks = {name: array for name, array in made.items() if name.startswith("mask.")}
    lines = {
        f"packed/{task}": np.packbits(np.concatenate([masks[f"mask.{task}/{n}"].ravel() for n in sorted(inputs.base)]))
        for task in range(len(inputs.each("model")))
    }
    return {**masks, **lines}


def consensus(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    options = masking(parameters)
    merged = smelt.merge_tensors("consensus", inputs.each("model"), inputs.base, **options)
    return {**merged, **parts_of(inputs, "consensus", options, "")}


def emr_merging(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    given = dict(parameters)
    if given.pop("variant", "released") not in ("released", "paper"):
        raise Mismatch(f"unknown variant {parameters['variant']!r}")
    rules = {"mean_of_tensor_means": "tensor_mean", "element": "element"}
    given["rescale"] = rules[given["rescale"]]
    options = arguments(given)
    made = parts_of(inputs, "emr_merging", options, "unified")
    return {**made, **task_models(inputs, "emr_merging", options)}


def masking(parameters: dict[str, Any], *ours: str) -> dict[str, Any]:
    """The arguments of a merge without those keys that are ours."""
    given = {name: value for name, value in parameters.items() if name not in ours}
    given["multi_task_vector"] = VECTORS[given.get("multi_task_vector", "sum")]
    if "k" in given:
        given["density"] = given.pop("k") / 100
    bars = given.pop("lambda", None)
    options = arguments(given)
    options["per_model" if isinstance(bars, list) else "parameters"].update({} if bars is None else {"lambda": bars})
    return options


def parts_of(inputs: Inputs, method: str, options: dict[str, Any], vector: str) -> Arrays:
    """The parts by the names of the cases, masks unpacked, one rescaler per task; ``own`` tensors left out."""
    made = smelt.merge_tensors(method, inputs.each("model"), inputs.base, parts=True, **options)
    found: Arrays = {}
    for name, array in made.items():
        kind, _, tensor = name.partition("/")
        if kind == "unified":
            found[f"{vector}/{tensor}"] = array
        elif kind.startswith("rescale"):
            found[f"{kind}/value"] = array.reshape(1)
        elif not kind.startswith("own"):
            shape = inputs.base[tensor].shape
            found[name] = np.unpackbits(array, count=int(np.prod(shape))).reshape(shape)
    return found


def task_models(inputs: Inputs, method: str, options: dict[str, Any]) -> Arrays:
    """What a merge with ``task`` gives, without the tensors that are excluded."""
    found: Arrays = {}
    merged = smelt.merge_tensors(method, inputs.each("model"), inputs.base, parts=True, **options)
    for task in range(len(inputs.each("model"))):
        given = {**options, "parameters": {**options["parameters"], "task": task}}
        model = smelt.merge_tensors(method, inputs.each("model"), inputs.base, **given)
        found.update({f"task.{task}/{n}": array for n, array in model.items() if f"unified/{n}" in merged})
    return found


RUNNERS = {"tall_masks": tall_masks, "consensus": consensus, "emr_merging": emr_merging}

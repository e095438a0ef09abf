"""Averages, soups, and the methods that take nothing but names."""

from __future__ import annotations

from typing import Any

import numpy as np

import smelt

from ..case import Arrays, Inputs, Mismatch, arguments, named, with_base


def linear(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    if parameters["variant"] == "greedy_soup":
        return greedy_soup(inputs, parameters)
    given = {"variant": "paper"} if parameters["variant"] == "uniform_soup" else parameters
    options = arguments(given)
    if parameters["variant"] == "mergekit" or "mergekit" in given.get("variant", ""):
        options["parameters"]["variant"] = "mergekit"
    return smelt.merge_tensors("linear", inputs.each("model"), **options)


def greedy_soup(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    """The search of the paper with the case's stub objective, each candidate merged by smelt."""
    models = inputs.each("model")
    target = named(inputs, "target")

    def score(model: Arrays) -> float:
        return -sum(float(((np.float64(model[n]) - np.float64(target[n])) ** 2).sum()) for n in sorted(target))

    scores = [score(model) for model in models]
    order = sorted(range(len(models)), key=lambda i: (scores[i], i), reverse=True)
    chosen, best = [order[0]], scores[order[0]]
    for index in order[1:]:
        candidate = score(smelt.merge_tensors("linear", [models[i] for i in [*chosen, index]]))
        if candidate > best:
            chosen, best = [*chosen, index], candidate
    if chosen != parameters["expected_ingredients_in_order"]:
        raise Mismatch(f"ingredients {chosen}, expected {parameters['expected_ingredients_in_order']}")
    return smelt.merge_tensors("linear", [models[i] for i in chosen])


def slerp(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    options = arguments({**parameters, "variant": None})
    return smelt.merge_tensors("slerp", inputs.each("model"), inputs.base, **options)


RUNNERS = {"linear": linear, "slerp": slerp, "task_arithmetic": with_base("task_arithmetic")}

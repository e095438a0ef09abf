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
    """The case's stub objective: the negative squared distance to a target."""
    if parameters["objective"] != "negative_squared_distance_to_data/target":
        raise Mismatch(f"unknown objective {parameters['objective']!r}")
    target = named(inputs, "target")

    def score(model: Arrays) -> float:
        return -sum(float(((np.float64(model[n]) - np.float64(target[n])) ** 2).sum()) for n in sorted(target))

    soup = smelt.greedy_soup(inputs.each("model"), score)
    if list(soup.chosen) != parameters["expected_ingredients_in_order"]:
        raise Mismatch(f"ingredients {soup.chosen}, expected {parameters['expected_ingredients_in_order']}")
    return dict(soup.model)


def slerp(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    options = arguments({**parameters, "variant": None})
    return smelt.merge_tensors("slerp", inputs.each("model"), inputs.base, **options)


RUNNERS = {"linear": linear, "slerp": slerp, "task_arithmetic": with_base("task_arithmetic")}

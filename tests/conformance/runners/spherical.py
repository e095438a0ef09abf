"""Means and arcs on the sphere."""

from __future__ import annotations

from typing import Any

import smelt

from ..case import Arrays, Inputs, Runner, arguments


def runner(method: str) -> Runner:
    """The base goes in where the case has one; methods with a single flavour know no ``variant``."""

    def run(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
        options = arguments(parameters)
        if len(smelt.methods.get(method).variants) < 2:
            options["parameters"].pop("variant", None)
        return smelt.merge_tensors(method, inputs.each("model"), inputs.base or None, **options)

    return run


RUNNERS = {method: runner(method) for method in ("karcher", "model_stock", "multislerp", "nuslerp")}

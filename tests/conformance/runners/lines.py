"""LiNeS: one model, or after another method."""

from __future__ import annotations

from typing import Any

import smelt

from ..case import Arrays, Inputs, Mismatch, arguments
from .masks import masking


def lines(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    given = dict(parameters)
    on, inner, layers = given.pop("on"), given.pop("inner", {}), given.pop("num_blocks")
    given["outside"] = given.pop("outside_blocks")
    if given.get("alpha") == "auto":
        del given["alpha"]
    around: dict[str, Any] = {"config": {"num_hidden_layers": layers}}
    if on == "single_model":
        return smelt.merge_tensors("lines", inputs.each("model"), inputs.base, parameters=given, **around)
    around["lines"] = given
    if on == "ties":
        inner = {"density": inner["top_k_percent"] / 100, "merge_func": f"dis-{inner['merge_func']}"}
        options = arguments(inner)
    elif on == "consensus":
        options = masking({"alpha": 1.0, **inner})
    elif on == "task_arithmetic":
        options = arguments(inner)
    else:
        raise Mismatch(f"unknown inner method {on!r}")
    return smelt.merge_tensors(on, inputs.each("model"), inputs.base, **options, **around)


RUNNERS = {"lines": lines}

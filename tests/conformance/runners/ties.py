"""TIES."""

from __future__ import annotations

from typing import Any

import smelt

from ..case import Arrays, Inputs, arguments, named


def ties(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    given = dict(parameters)
    if "top_k_percent" in given:
        given["density"] = given.pop("top_k_percent") / 100
    if "mask_rate" in given:
        given["density"] = 1 - given.pop("mask_rate")
    aliases = given.pop("tied", ())
    options = arguments(given)
    if given.get("sign") == "oracle":
        options["statistics"] = [{"sign": named(inputs, "sign")}]
    options["tied"] = {alias: owner_of(alias, aliases, inputs.base) for alias in aliases}
    return smelt.merge_tensors("ties", inputs.each("model"), inputs.base, **options)


def owner_of(alias: str, aliases: list[str], tensors: Arrays) -> str:
    """The tensor whose bits an alias repeats: one that is no alias itself, else the first of them."""
    same = [n for n, array in tensors.items() if array.tobytes() == tensors[alias].tobytes() and n not in aliases]
    return sorted(same or aliases)[0]


RUNNERS = {"ties": ties}

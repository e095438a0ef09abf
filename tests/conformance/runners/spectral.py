"""Methods on the singular vectors of task matrices."""

from __future__ import annotations

from typing import Any

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
    if variant not in TSV:
        raise Mismatch(f"unknown variant {variant!r}")
    options = arguments({**given, **TSV[variant]})
    return smelt.merge_tensors("tsv", inputs.each("model"), inputs.base, **options)


def iso(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    options = arguments(parameters)
    options["parameters"]["variant"] = parameters["variant"]
    return smelt.merge_tensors("iso", inputs.each("model"), inputs.base, **options)


RUNNERS = {"tsv": tsv, "iso": iso}

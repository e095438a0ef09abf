"""DARE and what is merged after dropping."""

from __future__ import annotations

from typing import Any

import smelt

from ..case import Arrays, Inputs, Mismatch, arguments, with_base


def dare(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    given = dict(parameters)
    inner = {**given.pop("ties", {}), **given.pop("fisher", {}), **given.pop("regmean", {})}
    given.pop("density", None)
    if given.pop("scope", "tensor") != "tensor" or inner.pop("scope", "model") != "model":
        raise Mismatch("scope is not what dare does")
    if "mask_rate" in inner:
        given["top_k"] = 1 - inner.pop("mask_rate")
    if "merge_func" in inner:
        given["merge_func"] = {"mean": "dis-mean"}.get(inner["merge_func"], inner["merge_func"])
        inner.pop("merge_func")
    renamed = {"normalize": "normalize_fishers", "minimal": "fisher_floor"}
    given.update({renamed.get(name, name): value for name, value in inner.items()})
    return smelt.merge_tensors(
        "dare", inputs.each("model"), inputs.base,
        masks=inputs.each("mask") or None, statistics=inputs.each("stats") or None, **arguments(given),
    )  # fmt: skip


RUNNERS = {"dare": dare, "dare_linear": with_base("dare_linear"), "dare_ties": with_base("dare_ties")}

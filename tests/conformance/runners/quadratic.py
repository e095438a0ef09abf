"""Methods that make a quadratic loss small: WUDI and its relatives."""

from __future__ import annotations

from typing import Any

import numpy as np

import smelt

from ..case import Arrays, Inputs, Mismatch, arguments

_LEVELLED = ("cumvar", "loss_elbow", "loss_residual", "wudi_risk")


def wudi(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    given = dict(parameters)
    variant = given.pop("variant")
    if "untouched" in given:
        given.update(untouched(given.pop("untouched")))
    given["lambda"] = given.pop("scaling_coefficient", 1.0)
    if "init_mode" in given:
        given["init"] = given.pop("init_mode")
    if "truncate_rank_ratio" in given:
        given["rank_level"] = given.pop("truncate_rank_ratio")
    rule, _, level = given.get("auto_rank_method", "").rpartition("_")
    if rule in _LEVELLED:
        given.update(auto_rank_method=rule, rank_level=float(level))
    options = arguments(given)
    options["parameters"]["variant"] = variant
    return smelt.merge_tensors("wudi", inputs.each("model"), inputs.base, **options)


def untouched(said: str) -> dict[str, str]:
    if said != "everything but the attention and mlp matrices keeps the base value":
        raise Mismatch(f"untouched: {said!r} is not known")
    return {"scope": "linear", "other": "base"}


def doge(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    given = dict(parameters)
    if given.pop("optimizer", "adam") != "adam":
        raise Mismatch(f"optimizer {parameters['optimizer']!r} is not known")
    share = given.pop("K", 30)
    given["density"] = share / 100 if share > 1 else share
    given["lambda"] = given.pop("lamda", 0.07)
    return smelt.merge_tensors("doge", inputs.each("model"), inputs.base, parameters=given)


_TUNED = {"internvl_full_ft": "full", "qwenvl_lora": "lora"}


def optmerge(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    given = dict(parameters)
    if given.pop("rank", "int(min(m,n)/n_models)") != "int(min(m,n)/n_models)":
        raise Mismatch(f"rank {parameters['rank']!r} is not known")
    variant = given.pop("variant")
    if variant == "modality_factors":
        return factors(inputs, given)
    if variant not in _TUNED:
        raise Mismatch(f"variant {variant!r} is not known")
    given.update(mode=_TUNED[variant], **{"lambda": given.pop("scaling_coefficient", 1.0)})
    given["exclude"] = given.pop("exclude_param_names_regex", [])
    return smelt.merge_tensors("optmerge", inputs.each("model"), inputs.base, parameters=given)


def factors(inputs: Inputs, given: dict[str, Any]) -> Arrays:
    """Adapters of several modalities, factor by factor: on a base of zeros where the method has one."""
    rule, models = given["merge_method"], inputs.each("model")
    if rule not in _RULES or given["K"] != 20:
        raise Mismatch(f"merge_method {rule!r} with K {given['K']} is not known")
    method, options = _RULES[rule]
    shared = set.intersection(*map(set, models))
    zeros = None if method == "optmerge" else {name: np.zeros_like(models[0][name]) for name in shared}
    return smelt.merge_tensors(method, models, zeros, parameters=options, on_extra="copy")


_RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "wudi2": ("optmerge", {"mode": "factors"}),
    "ties": ("ties", {"density": 0.2, "weight": 1.0}),
    "tsv": ("tsv", {}),
    "iso": ("iso", {"variant": "iso_c"}),
}

RUNNERS = {"wudi": wudi, "doge": doge, "optmerge": optmerge}

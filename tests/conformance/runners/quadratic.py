"""Methods that make a quadratic loss small: WUDI and its relatives."""

from __future__ import annotations

from typing import Any

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
    if variant not in _TUNED:
        raise Mismatch(f"variant {variant!r} is not known")
    given.update(mode=_TUNED[variant], **{"lambda": given.pop("scaling_coefficient", 1.0)})
    given["exclude"] = given.pop("exclude_param_names_regex", [])
    return smelt.merge_tensors("optmerge", inputs.each("model"), inputs.base, parameters=given)


RUNNERS = {"wudi": wudi, "doge": doge, "optmerge": optmerge}

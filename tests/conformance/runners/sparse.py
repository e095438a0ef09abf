"""Methods that thin task vectors by magnitude, and the small ones that came with mergekit."""

from __future__ import annotations

from typing import Any

import smelt

from ..case import Arrays, Inputs, Runner, arguments, with_base

SAMPLING = {
    "rank_magnitude_sampling": "rank", "rank_magnitude_layer_sampling": "tensor_rank",
    "magnitude_sampling": "magnitude", "magnitude_row": "top",
}  # fmt: skip
BAND = {"keep": "density", "remove": "gamma", "alpha": "lambda"}


def breadcrumbs(method: str) -> Runner:
    def run(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
        given = {BAND.get(name, name): value for name, value in parameters.items()}
        return with_base(method)(inputs, given)

    return run


def della(method: str) -> Runner:
    def run(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
        given = dict(parameters)
        window = given.pop("window_size", None)
        if window is not None:
            given.setdefault("epsilon", window / 2)
        if "sampling" in given:
            given["sampling"] = SAMPLING[given["sampling"]]
        if given.get("sampling") == "top":
            del given["epsilon"]
        elects = given.pop("sign_election", method == "della")
        return with_base("della" if elects else "della_linear")(inputs, given)

    return run


def without_variant(method: str) -> Runner:
    """mergekit's flavour is the only one."""

    def run(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
        options = arguments({**parameters, "variant": None})
        return smelt.merge_tensors(method, inputs.each("model"), inputs.base, **options)

    return run


RUNNERS = {
    **{name: breadcrumbs(name) for name in ("breadcrumbs", "breadcrumbs_ties")},
    **{name: della(name) for name in ("della", "della_linear")},
    **{name: without_variant(name) for name in ("nearswap", "arcee_fusion", "ram", "ramplus_tl")},
}

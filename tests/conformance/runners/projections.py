"""Methods that project: onto what the inputs span, onto columns, onto singular subspaces."""

from __future__ import annotations

from math import erf, sqrt
from typing import Any

import numpy as np

import smelt

from ..case import Arrays, Inputs, Mismatch


def regmean(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    if parameters.get("variant") == "regmean_plusplus":
        return regmean_plus_plus(inputs, parameters["reduce_non_diagonal_ratio"])
    if "variant" in parameters or "operation" in parameters:
        raise Mismatch("only the merge with given Gram matrices, and RegMean++, are known")
    given = dict(parameters)
    ratio = given.pop("reduce_non_diagonal_ratio")
    diagonal, average = given.pop("diagonal_only"), given.pop("regmean_exclude_regex")
    coefficients = given.pop("model_coefficients")
    if given:
        raise Mismatch(f"unknown parameters: {sorted(given)}")
    return smelt.merge_tensors(
        "regmean", inputs.each("model"),
        statistics=[{"gram": weights(stats["gram"])} for stats in inputs.each("stats")],
        parameters={"reduce_non_diagonal_ratio": 0 if diagonal else 1 if ratio is None else ratio, "average": average},
        per_model={"weight": coefficients} if coefficients else {},
    )  # fmt: skip


def regmean_plus_plus(inputs: Inputs, ratio: float) -> Arrays:
    """The case's network: h = x E^T, then h + fc2(gelu(fc1(norm(h)))) in each layer, in fp64."""

    def embed(tensors: Arrays, x: Any) -> tuple[Any, Arrays]:
        return x @ tensors["embed.weight"].T.astype(np.float64), {}

    def layer(number: int) -> Any:
        def run(tensors: Arrays, h: Any) -> tuple[Any, Arrays]:
            own = {name.removeprefix(f"layers.{number}."): array for name, array in tensors.items()}
            centred = h - h.mean(axis=-1, keepdims=True)
            scaled = centred / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + 1e-5)
            x = scaled * own["norm.weight"] + own["norm.bias"]
            y = gelu(x @ own["fc1.weight"].T + own["fc1.bias"])
            seen = {f"layers.{number}.fc1.weight": x, f"layers.{number}.fc2.weight": y}
            return h + y @ own["fc2.weight"].T + own["fc2.bias"], seen

        return run

    layers = [layer(number) for number in range(sum(name.endswith("fc1.weight") for name in inputs.base))]
    models, batches = inputs.each("model"), [[inputs.data[name]] for name in sorted(inputs.data)]
    return smelt.regmean_plus_plus(models, batches, [embed, *layers], reduce_non_diagonal_ratio=ratio)


def gelu(x: Any) -> Any:
    return x * (1 + np.vectorize(erf)(x / sqrt(2))) / 2


def weights(modules: Arrays) -> Arrays:
    """The reference names statistics by module, smelt by tensor."""
    return {f"{module}.weight": array for module, array in modules.items()}


def widen(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    """The reference divides by the length of a column; the precision that it ran in is not ours to choose."""
    given = {name: value for name, value in parameters.items() if name not in ("reference_dtype", "variant")}
    given = {"zero_column": "reference", "exclude": given.pop("exclude_param_names_regex", ()), **given}
    return smelt.merge_tensors("widen", inputs.each("model"), inputs.base, parameters=given)


def opcm(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    """What a case tells of the result (the last lambda, the mean norm) is no parameter."""
    if parameters.get("shuffle_order") or "operation" in parameters:
        raise Mismatch("only the merge of all models in the order given is known")
    models = inputs.each("model")
    given = {name: parameters[name] for name in ("alpha", "zero_diagonal") if name in parameters}
    order = parameters.get("order", range(len(models)))
    return smelt.merge_tensors("opcm", [models[index] for index in order], inputs.base, parameters=given)


RUNNERS = {"regmean": regmean, "widen": widen, "opcm": opcm}

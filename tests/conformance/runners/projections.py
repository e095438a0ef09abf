"""Methods that project: onto what the inputs span, onto columns, onto singular subspaces."""

from __future__ import annotations

from typing import Any

import smelt

from ..case import Arrays, Inputs, Mismatch


def regmean(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    if "variant" in parameters or "operation" in parameters:
        raise Mismatch("only the merge with given Gram matrices is known")
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

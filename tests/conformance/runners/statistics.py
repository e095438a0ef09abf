"""Methods that weight parameters by given statistics."""

from __future__ import annotations

from typing import Any

import smelt
from smelt.statistics import import_optimizer

from ..case import Arrays, Inputs, Mismatch, arguments

_RENAMED = {"fisher_weights": "weights", "scaling_coefficients": "weights", "minimal_fisher_weight": "fisher_floor"}


def fisher(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    operation(parameters, "merge")
    given = {_RENAMED.get(name, name): value for name, value in parameters.items() if name != "operation"}
    options = arguments({**given, "variant": None})
    options["parameters"]["variant"] = {"matena": "paper"}.get(parameters["variant"], parameters["variant"])
    return smelt.merge_tensors("fisher", inputs.each("model"), statistics=inputs.each("stats") or None, **options)


def ota(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    if parameters["operation"] == "import_optimizer":
        return dict(import_optimizer(inputs.folder / "checkpoint", inputs.base or inputs.each("model")[0]))
    operation(parameters, "merge")
    shared, per_model = preconditioning(parameters)
    base = inputs.base if parameters["base_given"] else None
    return smelt.merge_tensors(
        "ota", inputs.each("model"), base, parameters={"variant": "ota-merge", **shared}, per_model=per_model,
        statistics=inputs.each("stats"),
    )  # fmt: skip


def preconditioning(parameters: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Shared and per-model parameters: a model's own threshold stands before the common one."""
    shared = {name: value for name, value in parameters.items() if value is not None and name not in _CASE}
    models = parameters["models"]
    defaults = {"precond_threshold": shared.pop("precond_threshold", 0.0), "rank1_approx": False, "rank": 0,
                "scaling_factor": 1.0}  # fmt: skip
    each = {
        name: [own if (own := model.get(name)) is not None else default for model in models]
        for name, default in defaults.items()
    }
    return shared, each


_CASE = {"operation", "variant", "base_given", "models"}


def ffg(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    operation(parameters, "graft")
    shared, per_model = preconditioning(parameters)
    if not shared.pop("fallback_to_base") or not parameters["base_given"]:
        raise Mismatch("grafting goes back to the base")
    known = {
        "select": "threshold",
        "threshold": per_model["precond_threshold"][0],
        "rank1": per_model["rank1_approx"][0],
    }
    return smelt.merge_tensors(
        "ffg", inputs.each("model"), inputs.base, parameters=known, statistics=inputs.each("stats")
    )


def aim(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    """The authors' code rounds what it relaxes to bfloat16 and leaves the rest in its type."""
    operation(parameters, "relax")
    statistics = inputs.each("stats")

    def run(dtype: str | None) -> Arrays:
        return smelt.merge_tensors(
            "aim", inputs.each("model"), inputs.base, statistics=statistics,
            parameters={"variant": parameters["variant"], "omega": parameters["omega"]}, dtype=dtype,
        )  # fmt: skip

    relaxed, plain = run("bfloat16"), run(None)
    return {name: relaxed[name] if name in statistics[0]["input_abs_mean"] else plain[name] for name in plain}


def operation(parameters: dict[str, Any], known: str) -> None:
    if parameters["operation"] != known:
        raise Mismatch(f"operation {parameters['operation']!r} is not known")


RUNNERS = {"fisher": fisher, "ota": ota, "ffg": ffg, "aim": aim}

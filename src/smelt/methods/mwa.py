"""Metrics-weighted averaging: checkpoints of one run, each weighted by how well it did.

S. J. Yu and S. Choi, "Parameter-efficient checkpoint merging via metrics-weighted averaging", 2025,
https://arxiv.org/abs/2504.18580.

    theta = sum_i w_i theta_i,   w_i >= 0, sum w_i = 1

The weights grow with a goodness g_i: 1 / loss, the number of steps, or a score of which more is better. No code
was published; the forms of ``weighting`` are those of this package, with rho = ``penalty``:

power            w_i ~ g_i^rho                         (0: even weights; large: the best one alone)
softmax          w_i ~ exp(rho z_i), z standardised     (for metrics that lie close together, or below zero)
linear_penalty   w_i ~ g_i - rho min_j g_j              (towards 1 the worst one drops out)

The numbers stand in the recipe (``value``), in a JSON file (model -> number, or model -> {key: number}), or in
the trainer_state.json that Hugging Face's Trainer saves with a checkpoint (whose ``best_metric`` is the best so
far, not the checkpoint's own).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, fsum, isfinite, log, sqrt
from pathlib import Path, PurePath
from typing import Any

from .. import storage
from ..checkpoint.documents import brief, read_json
from ..errors import InputRejected, UsageError, show
from ..kernels.program import Call, call
from .linear import weighted_mean
from .registry import REQUIRED, Citation, Method, Parameter
from .tensors import Tensor
from .varm import shares

# --- weights --------------------------------------------------------------------------------------------


def metric_weights(
    values: Sequence[float], *, metric: str = "loss", weighting: str = "power", penalty: float = 1.0
) -> tuple[float, ...]:
    """The weights of models with these metrics; they add up to 1.

    Parameters
    ----------
    values: one number per model.
    metric: "loss" (less is better), "steps" or "score" (more is better).
    weighting, penalty: see the module; ``linear_penalty`` takes penalties below 1.

    Raises UsageError where the weighting is not defined: numbers that are not above 0, except for softmax.
    """
    if weighting == "softmax":
        return _softmax([-value for value in values] if metric == "loss" else values, penalty)
    bad = next((value for value in values if not value > 0), None)
    if bad is not None:
        raise UsageError(f"mwa: weighting: {weighting} needs a {metric} above 0, found {bad}: use weighting: softmax")
    goods = [1 / value for value in values] if metric == "loss" else values
    if weighting == "power":
        best = max(goods)
        return shares([exp(penalty * log(good / best)) for good in goods])
    if penalty >= 1:
        raise UsageError(f"mwa: weighting: linear_penalty needs a penalty below 1, not {penalty}")
    return shares([good - penalty * min(goods) for good in goods])


def _softmax(values: Sequence[float], penalty: float) -> tuple[float, ...]:
    mean = fsum(values) / len(values)
    spread = sqrt(fsum((value - mean) ** 2 for value in values) / len(values)) or 1.0
    highest = max(values)
    return shares([exp(penalty * (value - highest) / spread) for value in values])


def merge(tensor: Tensor) -> Call:
    weights = metric_weights(
        tensor.each["value"], metric=tensor["metric"], weighting=tensor["weighting"], penalty=tensor["penalty"]
    )
    relative = tuple(weight / max(weights) for weight in weights)  # even weights are then the plain mean, bit for bit
    return call(weighted_mean, models=tensor.models, weights=relative, mass=fsum(relative))


# --- metrics in files -----------------------------------------------------------------------------------

_STATE = "trainer_state.json"

#: What trainer_state.json states once, beside the log.
_STATED = {"global_step", "epoch", "best_metric"}


def read_metric(shared: Mapping[str, Any], label: str, folder: Path | None) -> dict[str, float]:
    """One model's metric, from where the recipe says. UsageError or InputRejected naming file and key."""
    if shared["metrics"] == "recipe":
        return {}
    if shared["metrics"] == "file":
        if not shared["metrics_file"]:
            raise UsageError("mwa: metrics: file needs metrics_file")
        return {"value": _from_file(Path(shared["metrics_file"]).expanduser(), label, shared["key"], _key(shared))}
    if folder is None or not storage.exists(folder / _STATE):
        raise InputRejected(f"{label}: no {_STATE} beside the weights: give the numbers in the recipe or in a file")
    return {"value": _from_trainer(folder / _STATE, _key(shared), shared["window"])}


def _key(shared: Mapping[str, Any]) -> str:
    key: str | None = shared["key"] or {"loss": "loss", "steps": "global_step"}.get(shared["metric"])
    if key is None:
        raise UsageError("mwa: metric: score needs key, the name under which the score was logged")
    return key


def _from_file(path: Path, label: str, given: str | None, key: str) -> float:
    content, where = read_json(path), storage.shown(path)
    name = next((name for name in (label, PurePath(label).name) if name in content), None)
    if name is None:
        raise InputRejected(f"{where} has no entry for {show(label)}")
    entry = content[name]
    if not isinstance(entry, dict):
        if given:
            raise InputRejected(f"{where}: {show(name)} is {brief(entry)}: there is no {show(given)} to look up")
        return _number(entry, f"{where}: {show(name)}")
    if key not in entry:
        raise InputRejected(f"{where}: {show(name)} has no {show(key)}, only {', '.join(map(show, sorted(entry)))}")
    return _number(entry[key], f"{where}: {show(name)}: {show(key)}")


def _from_trainer(path: Path, key: str, window: int) -> float:
    """A number that the state states, or the mean of the last ``window`` that were logged up to its step."""
    state, where = read_json(path), f"{storage.shown(path)}: {show(key)}"
    if key in _STATED:
        if window > 1:
            raise UsageError(f"mwa: window has no effect with key: {key}, which is stated once")
        return _number(state.get(key), where)
    log_history = state.get("log_history")
    entries = [entry for entry in log_history if isinstance(entry, dict)] if isinstance(log_history, list) else []
    step = state.get("global_step", 0)
    logged = [_number(e[key], where) for e in entries if key in e and _number(e.get("step", 0), where) <= step]
    if not logged:
        known = sorted({name for entry in entries for name in entry})
        raise InputRejected(f"{where} was not logged; logged were {', '.join(map(show, known)) or 'nothing'}")
    recent = logged[-window:]
    return fsum(recent) / len(recent)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise InputRejected(f"{where} is {brief(value)}, expected a finite number")
    return float(value)


METHODS = (
    Method(
        name="mwa",
        title="Metrics-weighted averaging",
        summary="mean of checkpoints of one run, each weighted by its loss, steps or score",
        advice="For the last checkpoints of one training run, with the loss of each on held-out data.",
        citation=Citation(
            "Parameter-efficient checkpoint merging via metrics-weighted averaging", "Yu and Choi", "2025",
            "https://arxiv.org/abs/2504.18580",
        ),
        merge=merge,
        base="ignored",
        measure=read_metric,
        parameters=(
            Parameter("value", "float", REQUIRED, "the model's metric", per_model=True, when=("metrics", ("recipe",))),
            Parameter("metric", "str", "loss", "what the numbers are: of a loss, less is better",
                      choices=("loss", "steps", "score")),
            Parameter("weighting", "str", "power", "how weights follow from metrics",
                      choices=("power", "softmax", "linear_penalty")),
            Parameter("penalty", "float", 1.0, "0 gives even weights (power, softmax), more prefers the best", low=0),
            Parameter("metrics", "str", "recipe", "where the numbers stand; files are for recipes only",
                      choices=("recipe", "trainer_state", "file")),
            Parameter("metrics_file", "str", None, "a JSON file: model -> number, or model -> {key: number}",
                      when=("metrics", ("file",))),
            Parameter("key", "str", None, "the number's name there, such as eval_loss; without it loss or global_step",
                      when=("metrics", ("trainer_state", "file"))),
            Parameter("window", "int", 1, "the mean of so many logged values, the last ones", low=1,
                      when=("metrics", ("trainer_state",))),
        ),
    ),
)  # fmt: skip

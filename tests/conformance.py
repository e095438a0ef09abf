"""Run golden cases: `python -m tests.conformance [DIR ...]`.

A case is a folder with ``case.json``, ``inputs.safetensors`` and ``expected.safetensors``; a DIR is a case,
a folder of cases, or a folder of such folders. Only names are adapted here: every formula lives in smelt.
Exit status 0 only when no case failed.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import smelt

Arrays = dict[str, Any]
GOLDEN = Path(__file__).parent / "golden"


class Mismatch(Exception):
    """A case came out wrong, or cannot be run: the message says why."""


# --- inputs ----------------------------------------------------------------------------------------------


class Inputs:
    """The tensors of a case by what they are."""

    def __init__(self, file: Path) -> None:
        self.base: Arrays = {}
        self.data: Arrays = {}
        self._numbered: dict[str, dict[int, Any]] = {
            "model": defaultdict(dict), "mask": defaultdict(dict), "stats": defaultdict(lambda: defaultdict(dict)),
        }  # fmt: skip
        tensors = smelt.load(file)
        for name in tensors:
            self._sort(name, tensors[name])

    def _sort(self, name: str, array: Any) -> None:
        head, _, rest = name.partition("/")
        kind, _, number = head.partition(".")
        if head == "base":
            self.base[rest] = array
        elif kind in ("model", "mask") and number.isdigit():
            self._numbered[kind][int(number)][rest] = array
        elif kind == "stats" and number.isdigit():
            statistic, _, tensor = rest.partition("/")
            self._numbered["stats"][int(number)][statistic][tensor] = array
        else:
            self.data[name] = array

    def each(self, kind: str) -> list[Any]:
        found = self._numbered[kind]
        return [found[index] for index in sorted(found)]


# --- one slug, one function: from the case's spelling to smelt's ------------------------------------------

IGNORED = {"variant", "mergekit_method"}
PER_MODEL = {"weight", "weights", "density", "drop_rate", "gamma", "epsilon", "coefficients"}


def arguments(parameters: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of ``merge_tensors`` that any case may set."""
    shared: dict[str, Any] = {}
    per_model: dict[str, list[Any]] = {}
    out: dict[str, Any] = {"parameters": shared, "per_model": per_model}
    if parameters.get("variant") == "mergekit":
        shared["variant"] = "mergekit"
    for name, value in parameters.items():
        if name in IGNORED or value is None:
            continue
        if name == "dtype":
            out[name] = value
        elif name in PER_MODEL and isinstance(value, list):
            per_model[name.rstrip("s") if name != "drop_rate" else name] = value
        else:
            shared[name] = value
    return out


def linear(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    if parameters["variant"] == "greedy_soup":
        return greedy_soup(inputs, parameters)
    given = {"variant": "paper"} if parameters["variant"] == "uniform_soup" else parameters
    options = arguments(given)
    if parameters["variant"] == "mergekit" or "mergekit" in given.get("variant", ""):
        options["parameters"]["variant"] = "mergekit"
    return smelt.merge_tensors("linear", inputs.each("model"), **options)


def greedy_soup(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    """The search of the paper with the case's stub objective, each candidate merged by smelt."""
    models = inputs.each("model")
    target = named(inputs, "target")

    def score(model: Arrays) -> float:
        return -sum(float(((np.float64(model[n]) - np.float64(target[n])) ** 2).sum()) for n in sorted(target))

    scores = [score(model) for model in models]
    order = sorted(range(len(models)), key=lambda i: (scores[i], i), reverse=True)
    chosen, best = [order[0]], scores[order[0]]
    for index in order[1:]:
        candidate = score(smelt.merge_tensors("linear", [models[i] for i in [*chosen, index]]))
        if candidate > best:
            chosen, best = [*chosen, index], candidate
    if chosen != parameters["expected_ingredients_in_order"]:
        raise Mismatch(f"ingredients {chosen}, expected {parameters['expected_ingredients_in_order']}")
    return smelt.merge_tensors("linear", [models[i] for i in chosen])


def with_base(method: str) -> Callable[[Inputs, dict[str, Any]], Arrays]:
    def run(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
        return smelt.merge_tensors(
            method, inputs.each("model"), inputs.base, masks=inputs.each("mask") or None, **arguments(parameters)
        )

    return run


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


def named(inputs: Inputs, kind: str) -> Arrays:
    """The tensors below ``data/<kind>/``."""
    prefix = f"data/{kind}/"
    return {name[len(prefix) :]: array for name, array in inputs.data.items() if name.startswith(prefix)}


def owner_of(alias: str, aliases: list[str], tensors: Arrays) -> str:
    """The tensor whose bits an alias repeats: one that is no alias itself, else the first of them."""
    same = [n for n, array in tensors.items() if array.tobytes() == tensors[alias].tobytes() and n not in aliases]
    return sorted(same or aliases)[0]


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


def slerp(inputs: Inputs, parameters: dict[str, Any]) -> Arrays:
    options = arguments({**parameters, "variant": None})
    return smelt.merge_tensors("slerp", inputs.each("model"), inputs.base, **options)


RUNNERS: dict[str, Callable[[Inputs, dict[str, Any]], Arrays]] = {
    "linear": linear,
    "slerp": slerp,
    "task_arithmetic": with_base("task_arithmetic"),
    "ties": ties,
    "dare": dare,
    "dare_linear": with_base("dare_linear"),
    "dare_ties": with_base("dare_ties"),
}


# --- running and comparing -------------------------------------------------------------------------------


def run_case(folder: Path) -> str:
    """Run one case; returns its slug. Raises Mismatch when it fails."""
    case = json.loads((folder / "case.json").read_text())
    slug = case["method"]
    if slug not in RUNNERS:
        raise Mismatch(f"method {slug!r} is not known")
    try:
        result = RUNNERS[slug](Inputs(folder / "inputs.safetensors"), case["parameters"])
    except smelt.SmeltError as error:
        raise Mismatch(f"refused: {error}") from error
    except Exception as error:
        raise Mismatch(f"crashed: {type(error).__name__}: {error}") from error
    compare(result, dict(smelt.load(folder / "expected.safetensors")), case["tolerance"])
    return slug


def compare(result: Arrays, expected: Arrays, tolerance: dict[str, float]) -> None:
    """Same names, shapes, dtypes, and |a - b| <= atol + rtol |b| everywhere."""
    if set(result) != set(expected):
        raise Mismatch(f"names differ: {sorted(set(result) ^ set(expected))[:5]}")
    worst = ("", 0.0, 0.0)
    for name, wanted in expected.items():
        got = result[name]
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            raise Mismatch(f"{name}: {got.dtype}{got.shape}, expected {wanted.dtype}{wanted.shape}")
        a, b = got.astype(np.float64), wanted.astype(np.float64)
        excess = np.abs(a - b) - (tolerance["atol"] + tolerance["rtol"] * np.abs(b))
        if excess.size and not excess.max() <= worst[1]:
            worst = (name, float(excess.max()), float(np.abs(a - b).max()))
    if worst[0]:
        raise Mismatch(f"{worst[0]}: error {worst[2]:.3g} exceeds {tolerance}")


def cases_in(folder: Path) -> Iterator[Path]:
    """All case folders at or below ``folder``, sorted."""
    if not folder.is_dir():
        raise SystemExit(f"no such folder: {folder}")
    yield from sorted(path.parent for path in folder.rglob("case.json"))


def main(arguments: list[str]) -> int:
    folders = [Path(argument) for argument in arguments] or [GOLDEN]
    passed: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for folder in (case for top in folders for case in cases_in(top)):
        slug = json.loads((folder / "case.json").read_text())["method"]
        try:
            run_case(folder)
            passed[slug] += 1
        except Mismatch as mismatch:
            failed[slug] += 1
            print(f"FAILED {slug}/{folder.name}: {mismatch}")
    for slug in sorted({*passed, *failed}):
        print(f"{slug:24} {passed[slug]:4} passed {failed[slug]:4} failed")
    print(f"{passed.total()} passed, {failed.total()} failed")
    return 1 if failed.total() or not passed.total() else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

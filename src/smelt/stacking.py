"""Recipes that stack layers: depth up-scaling, interleaving, repetition, pruning, shuffling.

A pattern becomes a ``passthrough`` recipe with one slice for each run of layers, to be read, changed and
merged like any other. Depth up-scaling: Kim et al., SOLAR, NAACL 2024, https://arxiv.org/abs/2312.15166.
Copies that begin as the identity: Wu et al., LLaMA Pro, ACL 2024, https://arxiv.org/abs/2401.02415.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .architecture import Structure
from .checkpoint import load
from .errors import InputRejected, UsageError, show
from .recipe import did_you_mean

#: Pattern -> the options that it heeds, beside dtype.
PATTERNS: dict[str, tuple[str, ...]] = {
    "blocks": ("scale",),
    "interleave": ("size", "step", "scale"),
    "repeat": ("every", "times", "scale"),
    "shuffle": ("weights", "seed", "full_random"),
}

_BLOCK = re.compile(r"(.+)\[(-?\d*):(-?\d*)\]")

#: The matrices that write into the residual stream.
_WRITERS = {"attention.o", "mlp.down", "expert.down", "shared_expert.down", "ssm.out"}


@dataclass(frozen=True)
class _Model:
    """A model as patterns see it. ``writers``: filters that match what it adds to the residual stream."""

    label: str
    layers: int
    writers: tuple[str, ...]
    normalised: bool  # what a layer adds is normalised again, so that scaling it changes nothing


@dataclass(frozen=True)
class _Run:
    """Layers ``first`` to ``last`` (exclusive) of a model; ``again`` when they have occurred before."""

    model: _Model
    first: int
    last: int
    again: bool = False


#: Opens a model by its label.
_Opener = Callable[[str], _Model]


def stack(
    pattern: str, models: Sequence[str], *, size: int | None = None, step: int | None = None,
    every: int | None = None, times: int | None = None, scale: float | None = None,
    weights: Sequence[float] | None = None, seed: int | None = None, full_random: bool | None = None,
    dtype: str | None = None, allow_pickle: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A recipe, as :func:`smelt.merge` takes it, that stacks layers of ``models`` in a pattern.

    Parameters
    ----------
    pattern:
        "blocks": the models with their layers, such as ``["a[0:24]", "a[8:32]"]`` (the end is exclusive,
        negative numbers count from the last layer), one after the other: up-scaling, pruning, frankenmerges.
        "interleave": blocks of ``size`` layers from each model in turn, each ``step`` layers further on.
        "repeat": one model; after each ``every`` layers (default 1) the last of them ``times`` more (default 1).
        "shuffle": the layers of one model's depth, each from a model drawn by ``weights`` (default: equal);
        with ``full_random`` from any place in it.
    scale: what layers that have occurred before add to the residual stream is multiplied by this (in "repeat"
        0 unless given: such a copy does nothing until it is trained; else 1).
    seed: of "shuffle" (default 0).
    dtype: the recipe's.
    allow_pickle: look into pickled weights, too, where there are no others.

    Raises UsageError for what cannot be, InputRejected for a model whose layers cannot be told.
    """
    given: dict[str, Any] = {
        "size": size, "step": step, "every": every, "times": times, "scale": scale, "weights": weights,
        "seed": seed, "full_random": full_random,
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    UsageError.gather(_problems(pattern, models, options))
    factor = float(options.pop("scale", 0 if pattern == "repeat" else 1))
    runs = _joined(_RUNS[pattern](partial(_opened, allow_pickle=allow_pickle), models, **options), factor)
    recipe = {"merge_method": "passthrough", "slices": [_slice(run, factor) for run in runs]}
    return recipe if dtype is None else {**recipe, "dtype": dtype}


def _problems(pattern: str, models: Sequence[str], options: dict[str, Any]) -> Iterator[str]:
    if pattern not in PATTERNS:
        hint = did_you_mean(pattern, PATTERNS) or f"; there are {', '.join(PATTERNS)}"
        yield f"no pattern {show(pattern)}{hint}"
        return
    yield from (f"{name} has no effect in the pattern {pattern}" for name in options if name not in PATTERNS[pattern])
    if not models:
        yield f"the pattern {pattern} needs a model"
    if pattern == "repeat" and len(models) > 1:
        yield f"the pattern repeat takes one model, not {len(models)}"
    if pattern == "interleave" and "size" not in options:
        yield "the pattern interleave needs size, the number of layers in a block"
    yield from (
        f"{name} must be at least 1, not {options[name]}"
        for name in ("size", "step", "every", "times")
        if options.get(name, 1) < 1
    )
    weights = options.get("weights")
    if weights is not None and (len(weights) != len(models) or min(weights) < 0 or not sum(weights) > 0):
        yield f"weights must be one for each of {len(models)} models, none negative and not all zero"


# --- models ---------------------------------------------------------------------------------------------


def _opened(label: str, allow_pickle: bool) -> _Model:
    """A model's depth, and what its layers write with, from headers and config."""
    with load(label, allow_pickle=allow_pickle) as checkpoint:
        structure = Structure.of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    stack = structure.main_stack
    if stack is None:
        raise InputRejected(f"{show(label)}: it cannot be told what its layers are: {'; '.join(structure.remarks)}")
    roles = [role for role in structure if role.layer is not None]
    writers = {_within_layer(role.name) for role in roles if role.role in _WRITERS}
    normalised = any("post_feedforward_layernorm" in role.name for role in roles)
    return _Model(label, stack.count, tuple(sorted(writers)), normalised)


def _within_layer(name: str) -> str:
    """A tensor's module as all layers and experts call it: "self_attn.o_proj"."""
    return re.split(r"\.\d+\.", name.rpartition(".")[0])[-1]


def _block(open_one: _Opener, text: str) -> _Run:
    """ "model[first:last]", or a whole model."""
    match = _BLOCK.fullmatch(text)
    model = open_one(match[1] if match else text)
    ends = (int(end) if end else None for end in (match[2], match[3])) if match else (None, None)
    first, last, _ = slice(*ends).indices(model.layers)
    if first >= last:
        raise UsageError(f"{show(text)} holds no layer: the model has {model.layers}, and the end is exclusive")
    return _Run(model, first, last)


# --- patterns -------------------------------------------------------------------------------------------


def _blocks(open_one: _Opener, texts: Sequence[str]) -> Iterator[_Run]:
    return (_block(open_one, text) for text in texts)


def _interleave(open_one: _Opener, labels: Sequence[str], size: int, step: int | None = None) -> Iterator[_Run]:
    models = [open_one(label) for label in labels]
    first = turn = 0
    while True:
        model = models[turn % len(models)]
        last = min(first + size, model.layers)
        if first < last:
            yield _Run(model, first, last)
        if last == model.layers:
            return
        first, turn = first + (step or size), turn + 1


def _repeat(open_one: _Opener, labels: Sequence[str], every: int = 1, times: int = 1) -> Iterator[_Run]:
    model = open_one(labels[0])
    for first in range(0, model.layers, every):
        last = min(first + every, model.layers)
        yield _Run(model, first, last)
        yield from [_Run(model, last - 1, last)] * times


def _shuffle(
    open_one: _Opener, labels: Sequence[str], weights: Sequence[float] | None = None, seed: int = 0,
    full_random: bool = False,
) -> Iterator[_Run]:  # fmt: skip
    models = [open_one(label) for label in labels]
    if len({model.layers for model in models}) > 1 and not full_random:
        depths = ", ".join(f"{model.label} {model.layers}" for model in models)
        raise InputRejected(f"layers can only be shuffled among models of one depth ({depths}), or with full_random")
    draw = random.Random(seed)
    for layer in range(models[0].layers):
        (model,) = draw.choices(models, weights)
        place = draw.randrange(model.layers) if full_random else layer
        yield _Run(model, place, place + 1)


_RUNS: dict[str, Callable[..., Iterator[_Run]]] = {
    "blocks": _blocks, "interleave": _interleave, "repeat": _repeat, "shuffle": _shuffle,
}  # fmt: skip


# --- recipes --------------------------------------------------------------------------------------------


def _joined(runs: Iterable[_Run], scale: float) -> list[_Run]:
    """Adjoining layers of one model as one run; layers that have occurred apart from new ones if they are scaled."""
    seen: set[tuple[str, int]] = set()
    found: list[_Run] = []
    for run in runs:
        for layer in range(run.first, run.last):
            again = scale != 1 and (run.model.label, layer) in seen
            seen.add((run.model.label, layer))
            before = found[-1] if found else None
            if before and (before.model, before.last, before.again) == (run.model, layer, again):
                found[-1] = replace(before, last=layer + 1)
            else:
                found.append(_Run(run.model, layer, layer + 1, again))
    return found


def _slice(run: _Run, scale: float) -> dict[str, Any]:
    source: dict[str, Any] = {"model": run.model.label, "layer_range": [run.first, run.last]}
    if run.again:
        source["parameters"] = {"scale": _setting(run.model, scale)}
    return {"sources": [source]}


def _setting(model: _Model, scale: float) -> list[dict[str, Any]]:
    if not model.writers:
        raise InputRejected(f"{show(model.label)}: it cannot be told which tensors add to the residual stream")
    if model.normalised and scale != 0:
        raise InputRejected(
            f"{show(model.label)} normalises what its layers add, so that a scale other than 0 has no effect"
        )
    return [*({"filter": writer, "value": scale} for writer in model.writers), {"value": 1.0}]

"""Recipes that take each other's results: planned together before any of them runs, then run one by one.

The result of a stage is a model like any other, in a folder that is named by what it is made of: the recipe,
the options that change it, and the identity of every file that goes into it. Where that folder is kept
(``stages=``), a later run finds it.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy.typing as npt

from .. import storage
from ..checkpoint import Checkpoint, TensorInfo
from ..errors import OperationFailed, UsageError, show
from ..recipe import ModelReference, Recipe, Stage, in_order
from .config import patched_configs
from .inputs import Input, Places, identified
from .manifest import versions
from .options import Options, options_of
from .planning import Plan, RecipeLike, make_plan, read_recipes


def plan(recipe: RecipeLike, *, models: Mapping[str, Any] | None = None, **options: Any) -> Plan:
    """Plan a merge without reading a weight.

    ``recipe``: a path to a YAML file, a mapping of the same content, or parsed recipes. ``models`` and
    ``options``: as for :func:`smelt.merge`. Raises UsageError or InputRejected with everything that is wrong.
    """
    return plan_stages(stages_of(recipe, models or {}), options_of(**options), models or {})


def stages_of(recipe: RecipeLike, models: Mapping[str, Any]) -> list[Stage]:
    """The stages of a recipe, the output last. UsageError for ``models`` that it does not name."""
    stages = in_order(read_recipes(recipe))
    recipes = [stage.recipe for stage in stages]
    references = [each for recipe in recipes for each in (*recipe.references(), *recipe.token_references())]
    named = {path for each in references for path in each.paths}
    taken = {stage.name for stage in stages[:-1]}
    UsageError.gather(
        f"models: {show(name)} is a document of the recipe" if name in taken
        else f"models: the recipe names no model {show(name)}"
        for name in models
        if name in taken or name not in named
    )  # fmt: skip
    UsageError.gather(
        recipe.position("output").report("a result that another document takes is not written as gguf")
        for recipe in recipes[:-1]
        if recipe.output is not None and recipe.output.format == "gguf"
    )
    return stages


def plan_stages(stages: Sequence[Stage], options: Options, models: Places) -> Plan:
    """The plan of the last stage, with those of the others: what these will make is known by its headers."""
    places = dict(models)
    plans: list[Plan] = []
    try:
        for stage in stages:
            plans.append(make_plan(stage.recipe, options, places))
            places[stage.name] = Promised(plans[-1], stage.name)
    except BaseException:
        for made in plans:
            made.close()
        raise
    return replace(plans[-1], stages=tuple(plans[:-1]))


def local_paths(stages: Sequence[Stage]) -> tuple[str, ...]:
    """What the recipes of all stages name that is a path on this machine: no output may tell where it is."""
    recipes = [stage.recipe for stage in stages]
    named = {path for recipe in recipes for each in _named(recipe) for path in each.paths}
    settings = [placed.setting for recipe in recipes for placed in recipe.all_settings()]
    words = (entry.value for setting in settings for entry in setting.values())
    named |= {word for word in words if isinstance(word, str) and "/" in word}
    return tuple(sorted(path for path in named if storage.exists(Path(path).expanduser())))


def _named(recipe: Recipe) -> Iterator[ModelReference]:
    return chain(recipe.references(), recipe.statistics(), recipe.token_references())


class Promised(Checkpoint):
    """What a plan will make: all of it but the values."""

    def __init__(self, plan: Plan, label: str) -> None:
        self.label = label
        outputs = sorted(plan.outputs, key=lambda output: output.name)
        self.tensors = {output.name: TensorInfo(output.name, output.dtype, output.shape) for output in outputs}
        self._files = plan.side_files() | patched_configs(plan)
        self.config = json.loads(self._files.get("config.json", b"{}"))
        donor = plan.inputs.donor.checkpoint
        self.parts, self.beside = donor.parts, donor.beside

    @property
    def side_files(self) -> Mapping[str, bytes]:
        return self._files

    def read(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        raise OperationFailed(f"{self.label} has not been made yet")

    def check_unchanged(self) -> None:
        """There is nothing yet."""


@contextmanager
def workplace(work: Path, options: Options) -> Iterator[Path]:
    """The folder of the stages' results: the one that was asked for, or one in ``work`` that lasts only if
    a failed run is to be continued.
    """
    if options.stages is not None:
        storage.make_folders(options.stages)
        yield options.stages
        return
    folder = work / "stages"
    storage.ensure_folder(folder)
    try:
        yield folder
    except BaseException:
        if not options.resume:
            storage.remove_tree(folder)
        raise
    storage.remove_tree(folder)


def home_of(stage: Stage, plan: Plan, work: Path) -> Path:
    """The folder of a stage's result, named by what the result depends on."""
    return work / f"{re.sub(r'[^A-Za-z0-9._-]', '_', stage.name)[:60]}-{fingerprint(plan)}"


def fingerprint(plan: Plan) -> str:
    """16 hexadecimal digits of what the bits of a result depend on: recipe, options, versions, every input file."""
    options = plan.options
    made_of = [
        versions(), plan.recipe.text, plan.seed, options.on_extra, options.on_nonfinite, options.raw, plan.shard_size,
        options.truncate_embeddings, plan.measured,
        [_identity(item) for item in (*plan.inputs, *plan.inputs.beside.values())],
        {name: hashlib.sha256(data).hexdigest() for name, data in plan.side_files().items()},
        *([] if plan.running is None else [plan.running.made_of]),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def _identity(item: Input) -> list[Any]:
    """What tells one state of an input from another; arrays in memory are never the same twice."""
    files = [identified(file) for file in item.checkpoint.files()]
    return [item.label, dict(item.checkpoint.config), files or secrets.token_hex(16)]

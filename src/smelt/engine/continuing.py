"""Add models to a merge that has saved its state: what merging all of them at once gives, without those merged before.

The recipe of the result is the earlier one with more models. So its manifest tells the whole history, and reproducing
it is merging all models at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from .. import storage
from ..checkpoint import load
from ..errors import InputRejected, UsageError, show
from ..methods import get
from ..recipe import ModelReference, Recipe, parse_mapping
from .card import public_name
from .earlier import Earlier, open_earlier
from .options import options_of
from .planning import Plan, make_plan
from .progress import Progress, Silent
from .run import Artifact, carry_out
from .settings import Resolver
from .stages import local_paths, stages_of

#: What is settled by the merge that is continued.
_SETTLED = ("on_extra", "on_nonfinite", "raw", "save_state", "seed", "stages", "truncate_embeddings")

#: A model by name, or as ``models`` of a recipe lists it.
Added = str | Path | Mapping[str, Any]


def continue_merge(
    merged: str | Path, added: Sequence[Added], out: str | Path, *, base: Any = None,
    models: Mapping[str, Any] | None = None, progress: Progress | None = None, **options: Any,
) -> Artifact:  # fmt: skip
    """Add models to a merge and publish the result, with its state, as the new folder ``out``.

    The bits are those of one merge of all models in that order. Models that were merged before are not read, and
    what the work takes does not depend on how many they are.

    Parameters
    ----------
    merged: a folder that ``merge(..., save_state=True)`` or this function has written. It is not changed.
    added: paths, hub ids or URLs, or entries as the list ``models`` of a recipe has them ({"model": ...,
        "parameters": ...}).
    out: a folder that does not exist yet, or is empty; with ``overwrite`` also one that smelt has made, such as
        ``merged``.
    base: where the base is, if it is neither under the name that the recipe gives it, nor beside ``merged``, nor on
        the hub at the revision of then.
    models: what names in ``added`` stand for, as for :func:`smelt.merge`.
    options: threads, memory, device, shard_size, card, force, strict, allow_pickle, overwrite, resume, as for
        :func:`smelt.merge`. What else changes bits is settled by the merge that is continued.

    Raises UsageError where its method cannot be continued, InputRejected where there is no state, or the base is
    another one, and what :func:`smelt.merge` raises.
    """
    started = time.monotonic()
    plan = plan_continued(merged, added, base=base, models=models, **options)
    return carry_out(plan, Path(out), progress or Silent(), started)


def plan_continued(
    merged: str | Path, added: Sequence[Added], *, base: Any = None, models: Mapping[str, Any] | None = None,
    **options: Any,
) -> Plan:  # fmt: skip
    """Plan what :func:`continue_merge` does without reading a weight. Takes and raises the same."""
    UsageError.gather(
        f"{name} is that of the merge that is continued: leave it out" for name in _SETTLED if name in options
    )
    UsageError.gather([] if added else ["there is no model to add"])
    earlier = open_earlier(Path(merged))
    try:
        content = earlier.content
        chosen = options_of(**{**content["options"], "seed": content["seed"], **options})
        entries, places = _named_apart(added, earlier, models or {})
        whole = {**earlier.tree, "models": [*earlier.tree["models"], *entries]}
        recipe = _recipe(earlier, whole, entries)
        if recipe.base_model is not None and recipe.base_model.path not in places:
            places.update(_base(recipe.base_model, earlier, base))
        stages = stages_of(recipe, places)
        UsageError.gather(["a model that is a recipe of its own is not added: merge it first"] if stages[1:] else [])
        return replace(make_plan(recipe, chosen, places, earlier), paths=local_paths(stages))
    except BaseException:
        earlier.tensors.close()
        raise


def _recipe(earlier: Earlier, whole: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> Recipe:
    """That of what is added alone, as the recipe of all models has it resolved."""
    method, flavour = get(earlier.recipe.method), earlier.content["variant"]
    (all_of_them,) = parse_mapping(whole)
    variant = Resolver(all_of_them, method).variant
    if variant != flavour:
        raise UsageError(f"variant {variant} follows from the parameters of what is added, {flavour} was merged before")
    chosen = {"variant": flavour} if len(method.variants) > 1 else {}
    (recipe,) = parse_mapping(
        {**whole, "models": entries, "parameters": {**(earlier.tree.get("parameters") or {}), **chosen}}
    )
    return replace(recipe, text=all_of_them.text)


def _named_apart(
    added: Sequence[Added], earlier: Earlier, models: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The models as a recipe lists them, and where their names lead.

    The manifest leaves out where models lie: one whose name another bears already gets a number behind it.
    """
    entries = [dict(given) if isinstance(given, Mapping) else {"model": str(given)} for given in added]
    places, taken, renamed = dict(models), set(earlier.entries), set[str]()
    for entry in entries:
        name = str(entry.get("model"))
        if name not in models and not storage.exists(Path(name).expanduser()):
            continue
        entry["model"], public = name, public_name(name, True)
        if public in taken:
            entry["model"] = public = next(free for n in count(2) if (free := f"{public}-{n}") not in taken)
            places[public] = models.get(name, name)
            renamed.add(name)
        taken.add(public)
    idle = renamed - {entry["model"] for entry in entries}
    return entries, {name: place for name, place in places.items() if name not in idle}


def _base(reference: ModelReference, earlier: Earlier, base: Any) -> Iterator[tuple[str, Any]]:
    """Where the base is, if not where its name says."""
    revision, beside = earlier.base["revision"], earlier.folder.absolute().parent / reference.path
    if base is not None:
        yield reference.path, str(base) if isinstance(base, Path) else base
    elif reference.revision is not None or "://" in reference.path:
        return
    elif revision is not None:
        yield reference.path, load(reference.path, revision=revision)
    elif storage.exists(Path(reference.path).expanduser()):
        return
    elif storage.exists(beside):
        yield reference.path, str(beside)
    else:
        raise InputRejected(f"the base {show(reference.path)} is not here: say where it is, with --base (base=)")

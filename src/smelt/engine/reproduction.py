"""`smelt reproduce`: run the recipe of a manifest again and compare the bits."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from .. import storage
from ..checkpoint import load
from ..errors import InputRejected, show
from ..methods import names as methods
from ..recipe import Recipe, in_order, parse
from .manifest import NAME, versions
from .progress import Progress
from .publish import SUFFIX
from .run import merge
from .verification import read_manifest


@dataclass
class Reproduction:
    """What :func:`reproduce` found. ``ok`` when every tensor and file came out the same."""

    folder: Path
    tensors: int = 0
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "tensors": self.tensors, "problems": self.problems, "notices": self.notices}


def reproduce(
    folder: str | Path, models: Mapping[str, str | Path] | str | Path | None = None, *,
    threads: int | None = None, memory: str | int = "1GiB", progress: Progress | None = None,
) -> Reproduction:  # fmt: skip
    """Merge again what an artefact was merged from, beside it, and compare; what was made again is removed.

    Parameters
    ----------
    models: where the models are that the manifest names without their folders: name -> path, or the folder that
        all of them lie in. Models of the hub are taken at the revision of the manifest.
    threads, memory: as for :func:`smelt.merge`.

    A difference is a problem in the result. Raises InputRejected where there is no manifest of a merge, and what
    :func:`smelt.merge` raises.
    """
    folder = Path(folder)
    content = read_manifest(folder)
    if content.get("method") not in methods():
        raise InputRejected(f"{show(folder)} was made by {show(content.get('method'))}, which is no merge")
    _check(content, show(folder / NAME))
    recipes = parse(content["recipe"], str(folder / NAME))
    places = dict(_places(recipes, content, models))
    home = folder.absolute().parent / f"{folder.name}{SUFFIX}-{secrets.token_hex(4)}"
    try:
        storage.ensure_folder(home)
        options = {**content.get("options", {}), "seed": content["seed"], "threads": threads, "memory": memory}
        again = merge(recipes, home / folder.name, models=places, progress=progress, force=True, **options)
        return _compared(folder, content, read_manifest(again.path))
    finally:
        storage.remove_tree(home)


#: Of what type the options in a manifest are.
_OPTIONS = {"on_extra": str, "on_nonfinite": str, "raw": bool, "card": bool, "save_state": bool, "shard_size": int,
            "truncate_embeddings": bool}  # fmt: skip


def _check(content: Mapping[str, Any], where: str) -> None:
    """Refuse what no run has written, before any of it is relied on."""
    options, versions, inputs = content.get("options", {}), content.get("versions", {}), content.get("inputs")
    wrong = [key for key, kind in {"recipe": str, "seed": int}.items() if type(content.get(key)) is not kind]
    if not isinstance(options, Mapping) or any(_OPTIONS.get(key) is not type(options[key]) for key in options):
        wrong.append("options")
    if not isinstance(versions, Mapping):
        wrong.append("versions")
    if not isinstance(inputs, list) or not all(map(_is_input, inputs)):
        wrong.append("inputs")
    InputRejected.gather(f"{where}: {key} is not what a merge has written" for key in wrong)


def _is_input(item: Any) -> bool:
    if not isinstance(item, Mapping) or not item.keys() >= {"model", "revision", "digest"}:
        return False
    return isinstance(item["model"], str) and isinstance(item["revision"], str | None)


def _places(
    recipes: Any, content: Mapping[str, Any], models: Mapping[str, str | Path] | str | Path | None
) -> Iterator[tuple[str, Any]]:
    """Where each name of the recipe leads that is not the result of another document."""
    stages = in_order(recipes)
    taken = {stage.name for stage in stages[:-1]}
    revisions = {item["model"]: item["revision"] for item in content["inputs"] if item["revision"]}
    given = models if isinstance(models, Mapping) else {}
    for name in sorted({name for stage in stages for name in _named(stage.recipe)} - taken):
        if name in given:
            yield name, str(given[name])
        elif name in revisions:
            yield name, load(name, revision=revisions[name])
        elif isinstance(models, str | Path) and storage.exists(Path(models) / name):
            yield name, str(Path(models) / name)


def _named(recipe: Recipe) -> Iterator[str]:
    found = chain(recipe.references(), recipe.token_references(), recipe.statistics())
    return (path for reference in found if reference.revision is None for path in reference.paths)


def _compared(folder: Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> Reproduction:
    """The model card bears the folder's name, which may have changed: it is not compared."""
    result = Reproduction(folder, len(found["tensors"]))
    for kind in ("tensors", "files"):
        one, other = (dict(content[kind]) for content in (wanted, found))
        names = sorted(one.keys() | other.keys()) if kind == "tensors" else sorted({*one, *other} - {"README.md"})
        result.problems += [f"{kind[:-1]} {show(n)} came out differently" for n in names if one.get(n) != other.get(n)]
    result.problems += _differing_states(wanted, found)
    if result.problems:
        inputs = {item["model"]: item["digest"] for item in found["inputs"]}
        changed = [item["model"] for item in wanted["inputs"] if inputs.get(item["model"]) != item["digest"]]
        result.notices += [f"the model {show(name)} is not the one that was merged then" for name in changed]
        then = wanted.get("versions", {})
        result.notices += [f"{name} was {then.get(name)} then, is {now}" for name, now in versions().items()
                           if then.get(name) != now]  # fmt: skip
    return result


def _differing_states(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """Tensors and numbers of the running states, where these were saved."""
    then, now = (content.get("state", {}) for content in (wanted, found))
    one, other = (state.get("tensors", {}) for state in (then, now))
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            yield f"tensor {show(name)} of the state came out differently"
    if then.get("numbers") != now.get("numbers"):
        yield "the numbers of the state came out differently"

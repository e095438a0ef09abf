"""What a merge left that saved its state: enough to add models to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import storage
from ..checkpoint import Checkpoint, load
from ..errors import InputRejected, UsageError, show
from ..methods import Method, get, names
from ..recipe import Recipe, as_mapping, parse_mapping
from .inputs import Input, identity
from .manifest import NAME, STATE_FOLDER
from .operands import CheckpointOperand, Ledger
from .progress import Progress
from .sink import sha256_of
from .verification import read_manifest

#: Of the state in a manifest.
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Earlier:
    """A merge to be continued: its manifest, its recipe as data and read, and the tensors of its state, opened."""

    folder: Path
    content: Mapping[str, Any]
    tree: Mapping[str, Any]
    recipe: Recipe
    tensors: Checkpoint

    @property
    def state(self) -> Mapping[str, Any]:
        return self.content["state"]  # type: ignore[no-any-return]

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """How the recipe names each input -> its entry in the manifest."""
        texts = dict.fromkeys(reference.text for reference in self.recipe.references())
        return dict(zip(texts, self.content["inputs"], strict=True))

    @property
    def models(self) -> list[dict[str, Any]]:
        """The entries of all inputs but the base."""
        return [entry for text, entry in self.entries.items() if text != self._base]

    @property
    def base(self) -> dict[str, Any]:
        """The base's entry."""
        return self.entries[self._base]

    @property
    def _base(self) -> str:
        assert self.recipe.base_model is not None
        return self.recipe.base_model.text

    def joined(self, added: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The entries of all inputs, in the order that a merge of all at once has: a base that is not listed last."""
        listed = any(given.model.text == self._base for given in self.recipe.models or ())
        return [*self.entries.values(), *added] if listed else [*self.models, *added, self.base]

    def repeated(self, entry: Mapping[str, Any]) -> str | None:
        """The name of the model with the same content, if it has been merged before."""
        return next((known["model"] for known in self.models if known["digest"] == entry["digest"]), None)

    def check_base(self, base: Input, ledger: Ledger, operands: Iterable[CheckpointOperand], threads: int) -> None:
        """Read ``operands`` of the base: InputRejected where it is not the one that was merged on."""
        with ThreadPoolExecutor(threads, thread_name_prefix="smelt") as pool:
            list(pool.map(CheckpointOperand.fingerprint, operands))
        if identity(base, ledger)["digest"] != self.base["digest"]:
            raise InputRejected(
                f"{base.label} is not the base that {storage.shown(self.folder)} was merged on: say where that is, "
                "with --base (base=)"
            )

    def check_state(self, threads: int, progress: Progress) -> None:
        """Read all of the state: InputRejected where it is not what was written."""

        def problem(name: str) -> str | None:
            found = sha256_of(self.tensors.read, self.tensors.tensors[name], progress.advance)
            if found == self.state["tensors"][name]["sha256"]:
                return None
            return f"{self.tensors.label}: tensor {show(name)} differs from the manifest: merge all models again"

        progress.start(sum(info.nbytes for info in self.tensors.tensors.values()), "checking the state")
        with ThreadPoolExecutor(threads, thread_name_prefix="smelt") as pool:
            problems = list(pool.map(problem, self.tensors.tensors))
        progress.finish()
        InputRejected.gather(filter(None, problems))


def open_earlier(folder: Path) -> Earlier:
    """Open what a merge left.

    UsageError where its method cannot be continued, InputRejected where there is no state that this version reads.
    """
    content, where = read_manifest(folder), storage.shown(folder)
    method = content.get("method")
    if method in names() and get(method).running is None:
        raise UsageError(f"{where}: {not_continued(get(method))}")
    if content.get("state") is None:
        raise InputRejected(f"{where} holds no state to continue from: merge with --save-state (save_state=True)")
    try:
        if content["state"]["format"] != FORMAT:
            raise ValueError(f"format {content['state']['format']!r}, expected {FORMAT}")
        tree = as_mapping(content["recipe"], str(folder / NAME))
        (recipe,) = parse_mapping(tree, str(folder / NAME))
        found = Earlier(folder, content, tree, recipe, load(folder / STATE_FOLDER))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputRejected(f"{where}: its state is not one that this version reads: {error}") from error
    try:
        InputRejected.gather(_problems(found))
    except BaseException:
        found.tensors.close()
        raise
    return found


def _problems(found: Earlier) -> Iterator[str]:
    """Whatever in manifest and headers does not fit together."""
    try:
        told = {name: [tensor["dtype"], tensor["shape"]] for name, tensor in found.state["tensors"].items()}
        complete = all({"model", "digest", "revision"} <= entry.keys() for entry in found.entries.values())
        complete &= isinstance(found.state["numbers"], Mapping) and isinstance(found.state["steps"], list)
        complete &= found.recipe.base_model is not None and found.recipe.models is not None
        complete &= {"seed", "variant", "notices"} <= found.content.keys()
        complete &= isinstance(found.content["options"], Mapping)
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        yield f"{storage.shown(found.folder / NAME)} does not tell what there is to continue"
        return
    stored = {name: [info.dtype, list(info.shape)] for name, info in found.tensors.tensors.items()}
    for name in sorted(stored.keys() | told.keys()):
        if stored.get(name) != told.get(name):
            yield f"{found.tensors.label}: tensor {show(name)} is not what the manifest says; smelt verify tells more"


def not_continued(method: Method) -> str:
    able = [name for name in names() if get(name).running is not None]
    return f"what {method.title} merges cannot be continued, only {' and '.join(able)} can: merge all models at once"

"""A model as another one would call it: the same tensors under the donor's names."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

import numpy.typing as npt

from ..architecture import Module, Stack, renamed, renaming
from ..checkpoint import Checkpoint
from .inputs import Input

#: A stored head may be missing where it is tied, and must not keep names from being matched.
HEAD = "lm_head.weight"


class View:
    """One model's tensors under the names of ``donor``: ``names`` maps the donor's name to the model's own.

    Names that no leading part explains stay as they are.
    """

    def __init__(self, item: Input, donor: Input) -> None:
        self.item = item
        names, known = item.checkpoint.tensors.keys(), donor.checkpoint.tensors.keys()
        self._pair = _leading_parts(names - {HEAD}, known - {HEAD})
        self.names = {(name if name in known else self.called(name)): name for name in names}
        if len(self.names) < len(names):  # two tensors would get one name
            self._pair, self.names = ("", ""), {name: name for name in names}
        self.is_renamed = any(name != own for name, own in self.names.items())

    def called(self, name: str) -> str:
        """The donor's name for a tensor, or a container, of this model."""
        return renamed(name, self._pair) or name

    def lent(self, name: str) -> str | None:
        """A model without a stored head lends its embedding, as tied weights mean."""
        return self.item.tied_source(name)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return self.item.structure.stacks

    def stack_of(self, module: Module) -> Stack | None:
        """The only stack of layers of one part of the model."""
        found = [stack for stack in self.stacks if f"{self.called(stack.prefix)}." in module]
        return found[0] if len(found) == 1 else None


def _leading_parts(names: Set[str], known: Set[str]) -> tuple[str, str]:
    there = renaming(names, known)
    if there is not None:
        return there
    back = renaming(known, names)
    return (back[1], back[0]) if back is not None else ("", "")


def contains(whole: Input, part: Input) -> bool:
    """Whether ``part`` is a model that ``whole`` holds beside others: the text model of one that sees."""
    more = len(whole.structure.stacks) > len(part.structure.stacks) > 0
    names, known = part.checkpoint.tensors.keys(), whole.checkpoint.tensors.keys()
    return more and renaming(names - {HEAD}, known) is not None


def alike(items: Iterable[Input], donor: Input) -> dict[str, Checkpoint]:
    """Every model as it can be compared with the others, by label: their common part, under the donor's names."""
    views = [View(item, donor) for item in items]
    shared = min(len(view.stacks) for view in views)
    return {
        view.item.label: Seen(view, shared) if view.is_renamed or len(view.stacks) > shared > 0
        else view.item.checkpoint
        for view in views
    }  # fmt: skip


class Seen(Checkpoint):
    """A checkpoint under the donor's names, with the config of the part that all models have."""

    def __init__(self, view: View, shared: int) -> None:
        checkpoint = view.item.checkpoint
        self._checkpoint, self._names = checkpoint, view.names
        self.label, self.folder, self.revision = checkpoint.label, checkpoint.folder, checkpoint.revision
        self.tensors = {name: checkpoint.tensors[own] for name, own in sorted(view.names.items())}
        self.config = _section(view, shared)

    def read(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        self._checkpoint.read(self._names[name], start, out)

    def check_unchanged(self) -> None:
        self._checkpoint.check_unchanged()


def _section(view: View, shared: int) -> Any:
    """The config, or of a model with more stacks than the others the section that counts the text's layers."""
    config: Any = view.item.checkpoint.config
    paths = [keys[0][:-1] for stack in view.stacks if len(keys := stack.count_keys) and len(keys[0]) > 1]
    if len(view.stacks) <= shared:
        return config
    text = [path for path in paths if "vision" not in path[0] and "audio" not in path[0]]
    for key in text[0] if len(text) == 1 else ():
        config = config[key]
    return {key: value for key, value in config.items() if key not in ("architectures", "model_type")}

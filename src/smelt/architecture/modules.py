"""The parts of a model with several: an encoder and a decoder, a text model and its vision tower.

A part is called as in the tensors' names ("encoder", "visual"), or by one of the usual words for what it is
(``text_decoder``, ``vision_tower``, ``multi_modal_projector``), whatever the family calls it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .structure import Structure

_VISION = ("vision_tower", "vision_model", "vision_encoder", "visual", "vision_embed_tokens")
_PROJECTOR = ("multi_modal_projector", "mm_projector", "multimodal_projector", "embed_vision", "connector", "projector")
_TEXT = ("language_model", "text_model")

#: The usual words, and the names that tensors have for what they mean.
_MEANT = {
    **dict.fromkeys(_VISION, _VISION),
    **dict.fromkeys(_PROJECTOR, _PROJECTOR),
    **dict.fromkeys(("text_decoder", *_TEXT), _TEXT),
}


@dataclass(frozen=True, slots=True)
class Module:
    """Part of a model: the tensors that begin with ``prefix`` (but with none of ``without``), and ``heads``."""

    prefix: str
    heads: frozenset[str] = frozenset()
    without: tuple[str, ...] = ()

    def __contains__(self, name: str) -> bool:
        return name in self.heads or (name.startswith(self.prefix) and not name.startswith(self.without))


def module_of(structure: Structure, word: str) -> Module | None:
    """The part that ``word`` names, or None."""
    words = (word, *(other for other in _MEANT.get(word, ()) if other != word))
    prefix = next((prefix for each in words if (prefix := _prefix(structure.roles, each)) is not None), None)
    if _MEANT.get(word) is not _TEXT:
        return None if prefix is None else Module(prefix)
    heads = frozenset(role.name for role in structure if role.role.split(".")[0] == "head" and role.kind == "post")
    if prefix is not None:
        return Module(prefix, heads)
    return _text_beside(structure, heads)


def _prefix(names: Iterable[str], word: str) -> str | None:
    """The shortest leading part of a name that ends in ``word``."""
    found = {_up_to(name, word) for name in names if f".{word}." in f".{name}."}
    return min(found, key=lambda prefix: (len(prefix), prefix), default=None)


def _up_to(name: str, word: str) -> str:
    before, _, _ = f".{name}.".partition(f".{word}.")
    path = f"{before}.{word}".lstrip(".")
    return path if path == name else f"{path}."


def _text_beside(structure: Structure, heads: frozenset[str]) -> Module | None:
    """The text model of a family that has no word for it: all beside its layers that is neither vision nor
    projector."""
    others = [prefix for word in (*_VISION, *_PROJECTOR) if (prefix := _prefix(structure.roles, word)) is not None]
    stacks = [stack.prefix for stack in structure.stacks if not f"{stack.prefix}.".startswith(tuple(others))]
    if not others or len(stacks) != 1:
        return None
    return Module(stacks[0].rpartition(".")[0] + ".", heads, tuple(others))


def parts(structure: Structure) -> tuple[str, ...]:
    """What the parts of a model are called: the first words of its names that tell them apart."""
    paths = [name.split(".") for name in structure.roles]
    while paths and len({path[0] for path in paths}) == 1 and all(len(path) > 2 for path in paths):
        paths = [path[1:] for path in paths]
    return tuple(dict.fromkeys(path[0] for path in paths))

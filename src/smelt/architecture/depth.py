"""Where the layers are: the containers whose numbered children are alike and as many as the config says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from .config import Config, KeyPath, depths, extra_layers
from .names import first_index

Shapes = Mapping[str, tuple[int, ...]]

#: What one child of a container holds: names relative to it, with shapes where these are known.
_Child = set[tuple[str, tuple[int, ...] | None]]

_LAYER_WORDS = {"layers", "layer", "h", "block", "blocks"}

#: Words in a name or in a config key that tell stacks apart.
_KINDS = {
    "encoder": "encoder", "decoder": "decoder", "vision": "vision", "visual": "vision", "image": "vision",
    "text": "text", "language": "text", "llm": "text", "audio": "audio", "speech": "audio",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack of layers.

    Attributes
    ----------
    prefix: the container, "model.layers"; layer 3 is "model.layers.3".
    count: number of layers.
    count_keys: where config.json states this number (several where a family repeats it); empty when it
        cannot be told which of several equal numbers is meant.
    """

    prefix: str
    count: int
    count_keys: tuple[KeyPath, ...]


def find_stacks(names: Iterable[str], shapes: Shapes, config: Config) -> tuple[tuple[Stack, ...], tuple[str, ...]]:
    """The stacks, sorted by prefix, and remarks on what looks like layers but fits no depth of the config."""
    known, extra = depths(config), extra_layers(config)
    stacks, remarks = [], []
    for prefix, children in sorted(_containers(names, shapes).items()):
        numbers = [n for n in sorted(set(known.values())) if len(children) - n in extra]
        whole = set(children) == set(range(len(children)))
        if whole and numbers and _are_alike(children):
            stacks.append(Stack(prefix, numbers[-1], _count_keys(prefix, numbers[-1], known)))
        elif prefix.rpartition(".")[2] in _LAYER_WORDS and _are_blocks(children):
            remarks.append(_remark(prefix, children, known))
    remarks += [
        f"{s.prefix}: config.json does not tell which key counts its layers" for s in stacks if not s.count_keys
    ]
    return tuple(stacks), tuple(remarks)


#: (names, shapes, config) to the stacks and remarks.
StackFinder = Callable[[Iterable[str], Shapes, Config], tuple[tuple[Stack, ...], tuple[str, ...]]]


def stacks_by_names(names: Iterable[str], shapes: Shapes, config: Config) -> tuple[tuple[Stack, ...], tuple[str, ...]]:
    """The stacks where no config counts the layers: rows of at least two blocks, numbered from 0 and alike."""
    found = sorted(_containers(names, shapes).items())
    rows = [(prefix, c) for prefix, c in found if len(c) > 1 and set(c) == set(range(len(c)))]
    return tuple(Stack(prefix, len(children), ()) for prefix, children in rows if _are_alike(children)), ()


def _containers(names: Iterable[str], shapes: Shapes) -> dict[str, dict[int, _Child]]:
    found: dict[str, dict[int, _Child]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        cut = first_index(name)
        if cut and cut.container and cut.rest:
            found[cut.container][cut.number].add((cut.rest, shapes.get(name)))
    return found


def _are_alike(children: Mapping[int, _Child]) -> bool:
    """Whether the children share a tensor that is more than a bare weight: single modules in a row are no
    layers, and stages of different width are not alike."""
    first, *others = children.values()
    return any("." in rest for rest, _ in first.intersection(*others))


def _are_blocks(children: Mapping[int, _Child]) -> bool:
    return all(any("." in rest for rest, _ in child) for child in children.values())


def _count_keys(prefix: str, count: int, known: Mapping[KeyPath, int]) -> tuple[KeyPath, ...]:
    """The keys that state ``count`` and fit the container's name best, if these stand side by side."""
    kinds = _kinds(prefix.split(".")) or {"text"}
    fitting = [path for path, value in known.items() if value == count]
    scores = {path: _score(_kinds(path), kinds) for path in fitting}
    best = [path for path in fitting if scores[path] == max(scores.values())]
    return tuple(sorted(best)) if len({path[:-1] for path in best}) == 1 else ()


def _kinds(words: Iterable[str]) -> set[str]:
    return {_KINDS[part] for word in words for part in word.split("_") if part in _KINDS}


def _score(key: set[str], container: set[str]) -> int:
    return len(key & container) - len(key - container)


def _remark(prefix: str, children: Mapping[int, _Child], known: Mapping[KeyPath, int]) -> str:
    numbers = sorted(children)
    said = ", ".join(f"{'.'.join(path)} = {value}" for path, value in sorted(known.items())) or "no number of layers"
    return (
        f"{prefix} holds {len(numbers)} numbered blocks ({numbers[0]} to {numbers[-1]}), config.json says {said}: "
        "not taken for layers"
    )

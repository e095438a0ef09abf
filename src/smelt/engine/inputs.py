"""Open the models that a recipe names, once each, and check that they can be merged at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..architecture import Structure
from ..architecture.config import vocabulary_sizes
from ..checkpoint import (
    AdapterGiven,
    Checkpoint,
    FileIdentity,
    is_adapter,
    load,
    load_adapted,
    open_adapter,
    side_files,
)
from ..checkpoint.quantisation import is_quantised, without_quantisation
from ..errors import InputRejected, SmeltError
from ..recipe import InputModel, ModelReference, Recipe
from .card import public_name
from .operands import CheckpointOperand, Ledger
from .statistics import Statistics


@dataclass(eq=False)
class Input:
    """One model of the recipe, opened. ``raw``: bare tensors, of which nothing else is known."""

    reference: ModelReference
    checkpoint: Checkpoint
    raw: bool = False
    operands: dict[str, CheckpointOperand] = field(default_factory=dict)

    @cached_property
    def structure(self) -> Structure:
        shapes = {name: info.shape for name, info in self.checkpoint.tensors.items()}
        return Structure.of(shapes, self.checkpoint.config)

    @cached_property
    def roles(self) -> Structure:
        """As ``structure``; a model without config is told by its names."""
        shapes = {name: info.shape for name, info in self.checkpoint.tensors.items()}
        return self.structure if self.checkpoint.config else Structure.by_names(shapes)

    @property
    def label(self) -> str:
        return self.reference.text

    @cached_property
    def vocabulary_rows(self) -> int | None:
        """How many rows the embedding of tokens has (the largest, of several); None without one."""
        found = [self.checkpoint.tensors[name].shape[0] for name in self.structure.vocabulary.embeddings]
        return max(found, default=None)

    def has_tokens(self, name: str) -> bool:
        """Whether a tensor has a row per token: not what embeds a few codes beside the words."""
        axis = None if self.raw else self.structure.vocabulary_axis(name)
        if axis is None or self.vocabulary_rows is None:
            return False
        stated = vocabulary_sizes(self.checkpoint.config)
        return self.checkpoint.tensors[name].shape[axis] >= min(stated | {self.vocabulary_rows})

    @property
    def public(self) -> str:
        """How outputs name it."""
        if self.is_local:
            return "+".join(public_name(path, True) for path in self.reference.paths)
        return public_name(self.label, False)

    @property
    def is_local(self) -> bool:
        return self.checkpoint.revision is None

    def tied_source(self, name: str) -> str | None:
        """The stored embedding that stands for an absent head, or None."""
        return None if self.raw else self.structure.tied_source(name)

    def operand(self, name: str, ledger: Ledger | None) -> CheckpointOperand:
        """The operand of a tensor: one object, so that reads are shared."""
        if name not in self.operands:
            self.operands[name] = CheckpointOperand(self.checkpoint, name, ledger)
        return self.operands[name]


#: What a name in a recipe stands for: a folder, an opened checkpoint, arrays, or a module of a live model.
Places = Mapping[str, Any]


class Inputs:
    """All models of a recipe by reference, in the order of first mention, and the donor of side files.

    ``beside`` are the statistics checkpoints by the text that names them.
    """

    def __init__(
        self, recipe: Recipe, places: Places = MappingProxyType({}), *, raw: bool = False, allow_pickle: bool = False
    ) -> None:
        """``places``: where a name of the recipe leads, other than to a path or the hub. ``raw``: bare tensors."""
        open_one = partial(_load, places=places, allow_pickle=allow_pickle)
        self.ledger = Ledger()
        problems: list[str] = []
        lenders = recipe.vocabulary.lenders() if recipe.vocabulary is not None else ()
        self._by_text = _opened((*recipe.references(), *lenders), "", problems, open_one, raw, recipe.base_model)
        self.beside = _opened(recipe.statistics(), "statistics ", problems, open_one)
        self._statistics = {text: Statistics(item.checkpoint, self.ledger) for text, item in self.beside.items()}
        InputRejected.gather(dict.fromkeys(problems))
        first = recipe.base_model or next(recipe.references())
        self.donor = self._by_text[first.text]
        #: Without those that lend single rows of their embedding only.
        self.merged = tuple(self._by_text[text] for text in dict.fromkeys(r.text for r in recipe.references()))
        self._places = places
        self._tokenizers: dict[str, Path] = {}

    def __contains__(self, reference: object) -> bool:
        return isinstance(reference, ModelReference) and reference.text in self._by_text

    def __getitem__(self, reference: ModelReference) -> Input:
        return self._by_text[reference.text]

    def __iter__(self) -> Iterator[Input]:
        return iter(self._by_text.values())

    def side_files(self, reference: ModelReference) -> Mapping[str, bytes]:
        """Of a model that lends its tokenizer alone, which needs no weights."""
        if reference.revision is None and reference.path in self._places:
            return _load(reference, reference.text, places=self._places).side_files
        files, folder = side_files(reference.path, reference.revision)
        if folder is not None:
            self._tokenizers[reference.text] = folder
        return files

    def statistics(self, entry: InputModel | None) -> Statistics | None:
        """What is given beside a model."""
        return self._statistics[entry.statistics.text] if entry is not None and entry.statistics else None

    def _all(self) -> Iterator[Input]:
        yield from self
        yield from self.beside.values()

    @property
    def scratch(self) -> int:
        """Memory that reading takes beside what it fills: what all share, and what each keeps for itself."""
        checkpoints = [item.checkpoint for item in self._all()]
        return max((made.scratch for made in checkpoints), default=0) + sum(made.held for made in checkpoints)

    def folders(self) -> list[Path]:
        return [*(folder for item in self._all() for folder in item.checkpoint.folders()), *self._tokenizers.values()]

    def local_paths(self) -> list[str]:
        """How the recipe names what lies on this machine."""
        named = (text for item in self._all() if item.is_local for text in (item.label, *item.reference.paths))
        return [*named, *self._tokenizers]

    def notices(self) -> list[str]:
        """What is odd about the files, and what was not understood of the models in them."""
        odd = [f"{item.checkpoint.label}: {note}" for item in self._all() for note in item.checkpoint.notices]
        return [*odd, *(f"{item.label}: {note}" for item in self for note in item.structure.remarks)]

    def refuse_quantised(self) -> None:
        """Averaging codes of a quantised model is a silent disaster: what is not dequantised is refused."""
        InputRejected.gather(problem for item in self for problem in quantised(item))

    def check_unchanged(self) -> None:
        for item in self._all():
            item.checkpoint.check_unchanged()

    def close(self) -> None:
        for item in self._all():
            item.checkpoint.close()


def _opened(
    references: Iterable[ModelReference], what: str, problems: list[str],
    open_one: Callable[[ModelReference, str, ModelReference | None], Checkpoint], raw: bool = False,
    base: ModelReference | None = None,
) -> dict[str, Input]:  # fmt: skip
    """Each checkpoint once; what cannot be opened is appended to ``problems``. ``what`` leads their labels.

    ``base``: what adapters belong to that are named alone.
    """
    found: dict[str, Input] = {}
    for reference in references:
        if reference.text in found:
            continue
        try:
            checkpoint = open_one(reference, what + reference.text, base)
            if raw:
                checkpoint.strip()
            found[reference.text] = Input(reference, checkpoint, raw)
        except InputRejected as error:
            problems += error.problems
    return found


def _load(
    reference: ModelReference, label: str, base: ModelReference | None = None, *, places: Places,
    allow_pickle: bool = False,
) -> Checkpoint:  # fmt: skip
    """A model with its adapters; an adapter that is named alone, on ``base``."""
    place = places.get(reference.path) if reference.revision is None else None
    if is_adapter(place) and base is not None:
        return load_adapted(_load(base, base.text, places=places, allow_pickle=allow_pickle), [(place, 1.0)], label)
    try:
        source = reference.path if place is None else place
        model = load(source, revision=reference.revision, label=label, allow_pickle=allow_pickle)
    except AdapterGiven:
        if base is None or base.text == reference.text or reference.adapters:
            raise
        found = open_adapter(source, reference.revision, allow_pickle=allow_pickle)
        return load_adapted(_load(base, base.text, places=places, allow_pickle=allow_pickle), [(found, 1.0)], label)
    if not reference.adapters:
        return model
    opened = [
        (open_adapter(places.get(a.path, a.path), a.revision, allow_pickle=allow_pickle), a.weight)
        for a in reference.adapters
    ]
    return load_adapted(model, opened, label)


def quantised(item: Input) -> Iterator[str]:
    """What keeps a model from being merged as floats: codes that are not understood."""
    if is_quantised(item.checkpoint):
        from ..checkpoint.quantised import refusals

        yield from refusals(item.checkpoint)


def read_config(checkpoint: Checkpoint) -> bytes | None:
    """config.json byte for byte, but for what it says of codes where weights are read; or None."""
    stored = checkpoint.side_files.get("config.json")
    if stored is None:
        return (json.dumps(dict(checkpoint.config), indent=2) + "\n").encode() if checkpoint.config else None
    said = json.loads(stored)
    plain = without_quantisation(said)
    if plain == said or without_quantisation(checkpoint.config) != checkpoint.config:
        return stored
    return (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()


def licence_of(inputs: Inputs, earlier: Path | None = None) -> str | None:
    """The licence named by every parent's card, if all name the same; an ``earlier`` merge speaks for its parents."""
    found = {_licence(item.checkpoint.side_files) for item in inputs}
    found |= set() if earlier is None else {_licence(side_files(str(earlier))[0])}
    return found.pop() if len(found) == 1 else None


def _licence(files: Mapping[str, bytes]) -> str | None:
    try:
        head = files.get("README.md", b"")[:4096].decode("utf-8", "replace")
    except SmeltError:
        return None
    lines = [line for line in head.split("---")[1].splitlines() if line.startswith("license:")] if "---" in head else []
    return lines[0].partition(":")[2].strip() if lines else None


def identified(file: FileIdentity) -> list[Any]:
    """What tells one state of a file from another."""
    return [str(file.path.resolve()), file.device, file.inode, file.size, file.mtime_ns, file.version]


def identity(item: Input, ledger: Ledger) -> dict[str, Any]:
    """How the manifest names an input: label, revision, files, and the digest of what was read."""
    import xxhash

    digests = ledger.digests(item.checkpoint.label)
    lines = "".join(f"{name} {digest}\n" for name, digest in digests.items())
    return {
        "model": item.public,
        "revision": item.checkpoint.revision,
        "files": [
            {"name": file.path.name, "size": file.size} | ({"version": file.version} if file.version else {})
            for file in item.checkpoint.files()
        ],
        "tensors_read": len(digests),
        "digest": xxhash.xxh3_128_hexdigest(lines.encode()),
    }

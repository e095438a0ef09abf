"""Adapters in one file without a config, as trainers of diffusion models write them.

Kohya's names spell a module with underscores, "lora_unet_down_blocks_0_attentions_0_proj_in"; diffusers' have dots
and the part of the pipeline in front, "unet.down_blocks.0....". Alpha is a number beside each module; without it the
product is added as it is. LyCORIS' Hadamard and Kronecker factors are taken as well.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite

from ...errors import InputRejected, show
from ..base import Checkpoint, TensorInfo
from ..documents import brief, parse_json
from .config import Config
from .reading import Adapter, understood

KIND = "KOHYA"

#: The spellings of what PEFT calls otherwise.
_SPELT = {
    "lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "lora.down.weight": "lora_A.weight",
    "lora.up.weight": "lora_B.weight",
}  # fmt: skip
_ALPHA = ".alpha"

#: The factor whose first axis is the rank.
_RANKED = ("lora_A.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")

#: Where a module's name ends.
_FACTOR = re.compile(r"\.(lora_|hada_|lokr_)")

#: Which part of a pipeline a module belongs to.
_PART = re.compile(r"(?:lora_|lycoris_)?(unet|te\d?|transformer|prior|text_encoder(?:_\d)?)[._]")


@dataclass(frozen=True)
class FlatConfig(Config):
    """What a config would say, from the file itself."""

    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    def rank(self, module: str) -> int:
        return self.ranks.get(module, 1)

    def scaling(self, module: str) -> float:
        """1 where there is no alpha, or no rank: Kronecker factors that are stored whole."""
        return self.alphas[module] / self.ranks[module] if module in self.alphas and module in self.ranks else 1.0


def read_flat(file: Checkpoint) -> Adapter:
    """The adapter in a file without config. Raises InputRejected for what is not understood."""
    tensors, alphas = {}, {}
    for name, info in file.tensors.items():
        if name.endswith(_ALPHA):
            alphas[name.removesuffix(_ALPHA)] = _number(file, info)
        else:
            tensors[_respelt(name)] = info
    modules = {name[: match.start()] for name in tensors if (match := _FACTOR.search(name))}
    InputRejected.gather(
        f"{file.label}: tensor {show(name + _ALPHA)} is not understood: its module has no factors"
        for name in sorted(alphas.keys() - modules)
    )
    alphas |= _from_metadata(file, modules)
    ranks = {name.removesuffix("." + part): info.shape[0] for name, info in tensors.items() for part in _RANKED
             if name.endswith("." + part) and info.shape}  # fmt: skip
    beside = [name for name in file.tensors if name.endswith(_ALPHA)]
    return understood(file, FlatConfig(file.label, {"peft_type": KIND}, ranks, alphas), tensors, beside)


def _respelt(name: str) -> str:
    for spelt, known in _SPELT.items():
        if name.endswith("." + spelt):
            return name.removesuffix(spelt) + known
    return name


def _number(file: Checkpoint, info: TensorInfo) -> float:
    value = float(file[info.name].reshape(-1)[0]) if info.count == 1 else 0.0
    if not value or not isfinite(value):
        raise InputRejected(f"{file.label}: {show(info.name)} {list(info.shape)} is no alpha: expected a number but 0")
    return value


def _from_metadata(file: Checkpoint, modules: Collection[str]) -> dict[str, float]:
    """Alphas that diffusers keeps in the file's metadata, for all modules of a part at once."""
    text = file.metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    said = parse_json(text.encode(), f"{file.label}: its lora_adapter_metadata")
    alphas = {key.removesuffix(".lora_alpha"): said[key] for key in said if key.endswith(".lora_alpha")}
    for part, alpha in alphas.items():
        if type(alpha) not in (int, float) or not 0 < abs(alpha) < 1e300:
            raise InputRejected(
                f"{file.label}: alpha of {show(part)} in its metadata is {brief(alpha)}, expected a number"
            )
    odd = [key for key in said if key.endswith(("_pattern", "use_dora", "use_rslora", "lora_bias")) and said[key]]
    if odd:
        raise InputRejected(f"{file.label}: {show(odd[0])} in its metadata is not merged by this version")
    return {
        module: float(alpha) for part, alpha in alphas.items() for module in modules if module.startswith(part + ".")
    }


class FlatNames:
    """The modules of a base by the ends of their names, spelt with underscores."""

    def __init__(self, names: Collection[str]) -> None:
        self._by_end: dict[str, set[str]] = defaultdict(set)
        modules = {name.rpartition(".")[0] for name in names}
        self._whole = {module.replace(".", "_"): {module} for module in modules}
        for module in modules:
            parts = module.split(".")
            for first in range(len(parts)):
                self._by_end["_".join(parts[first:])].add(module)

    def __call__(self, target: str) -> str:
        """The base's name of a tensor; the same name where none, or more than one, could be meant."""
        module, _, parameter = target.rpartition(".")
        flat = _without_part(module)
        found = self._whole.get(flat) or self._by_end.get(flat, set())
        return f"{next(iter(found))}.{parameter}" if len(found) == 1 else target


def parts_without(targets: Collection[str], found: Mapping[str, bool]) -> Iterator[str]:
    """The parts of a pipeline of which the base has not a single module, while it has some of another's."""
    seen: dict[str, bool] = defaultdict(bool)
    for target in targets:
        seen[part_of(target)] |= found[target]
    if any(seen.values()):
        yield from sorted(part for part, is_there in seen.items() if not is_there)


def part_of(target: str) -> str:
    match = _PART.match(target)
    return match[1] if match else ""


def _without_part(module: str) -> str:
    return _PART.sub("", module, count=1).replace(".", "_")

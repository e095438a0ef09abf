"""How models lay out what adapters attach to: transposed linear layers, stacked experts, names on disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

#: Families whose linear layers are stored as (in, out), and what these are called.
TRANSPOSED_FAMILIES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
TRANSPOSED_LAYERS = {"c_attn", "c_proj", "c_fc", "q_attn"}

#: Families that stack experts as (experts, in, out); the others as (experts, out, in).
_TRANSPOSED_EXPERTS = {"gpt_oss", "llama4", "llama4_text"}

#: Experts that lie apart on disk and are stacked in memory: how the stack's module ends, how that of one expert
#: ends, and which layers of it each stacked parameter holds, from the top.
_APART = (
    (".mlp.experts", ".mlp.experts", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}),
    (".mlp.experts", ".block_sparse_moe.experts", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}),
)

#: What composite models are called in memory by current transformers, and on disk.
_RENAMED = (
    {
        "model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.", "lm_head.": "language_model.lm_head.",
    },
    {"model.language_model.": "model.", "model.visual.": "visual."},
)  # fmt: skip

Rename = Callable[[str], str]


def is_transposed_layer(module: str, config: Mapping[str, Any]) -> bool | None:
    """Whether a linear layer is stored as (in, out), where the family tells."""
    if config.get("model_type") not in TRANSPOSED_FAMILIES:
        return None
    return module.rpartition(".")[2] in TRANSPOSED_LAYERS


def has_transposed_experts(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in _TRANSPOSED_EXPERTS


def experts_apart(module: str, parameter: str, number: int, names: Collection[str]) -> tuple[str, ...]:
    """The tensors on disk of expert ``number`` of a stacked parameter, from the top; none where it is whole."""
    for stacked, single, layers in _APART:
        if module.endswith(stacked) and parameter in layers:
            owner = module.removesuffix(stacked) + single
            found = tuple(f"{owner}.{number}.{layer}.weight" for layer in layers[parameter])
            if all(name in names for name in found):
                return found
    return ()


def renames(names: Collection[str]) -> Iterator[Rename]:
    """Ways to come from a name in memory to one on disk, the likelier first."""
    yield lambda name: name
    for table in _RENAMED:
        yield lambda name, table=table: _renamed(name, table)  # type: ignore[misc]
    yield lambda name: name.partition(".")[2]
    for first in sorted({name.partition(".")[0] for name in names}):
        yield lambda name, first=first: f"{first}.{name}"  # type: ignore[misc]


def _renamed(name: str, table: Mapping[str, str]) -> str:
    old = next((prefix for prefix in table if name.startswith(prefix)), None)
    return name if old is None else table[old] + name.removeprefix(old)

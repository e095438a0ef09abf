"""How PEFT names the tensors of an adapter and describes them: the layout of its version 0.21."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .modules import Module

CONFIG = "adapter_config.json"

#: Ends of architecture names, and what PEFT calls their task.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}  # fmt: skip


def key(module: str, part: str) -> str:
    return f"base_model.model.{module}.{part}"


def factor_names(module: Module) -> tuple[str, str]:
    """The names of A and B."""
    if module.kind == "embedding":
        return key(module.name, "lora_embedding_A"), key(module.name, "lora_embedding_B")
    return key(module.name, "lora_A.weight"), key(module.name, "lora_B.weight")


def config(
    ranks: Mapping[str, int], whole: Collection[str], every: Sequence[Module], *, base: str, bias: bool,
    architecture: str | None, transposed: bool,
) -> bytes:  # fmt: skip
    """adapter_config.json for modules of these ranks; ``whole`` are those stored whole, ``every`` all of the model's.

    alpha equals the rank everywhere, so that the factors' product is added as it is.
    """
    largest = max(ranks.values(), default=1)
    others = {name: rank for name, rank in sorted(ranks.items()) if rank != largest}
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": next((task for end, task in _TASKS.items() if (architecture or "").endswith(end)), None),
        "base_model_name_or_path": base,
        "revision": None,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": _short(ranks, every),
        "modules_to_save": _short(whole, every) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": bias,
        "fan_in_fan_out": transposed,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def _short(names: Collection[str], every: Sequence[Module]) -> list[str]:
    """The last parts of the names, and whole names where such a part stands for other modules as well."""
    strangers = {module.last for module in every if module.name not in names}
    parts = {name: name.rpartition(".")[2] for name in names}
    return sorted({name if part in strangers else part for name, part in parts.items()})

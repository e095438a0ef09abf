"""How PEFT names the tensors of an adapter and describes them: the layout of its version 0.21."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..checkpoint.adapter import CONFIG as CONFIG
from .modules import Module

#: Ends of architecture names, and what PEFT calls their task.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}  # fmt: skip


def key(module: str, part: str) -> str:
    return f"base_model.model.{module}.{part}"


def factor_names(module: str, embedding: bool) -> tuple[str, str]:
    """The names of A and B."""
    if embedding:
        return key(module, "lora_embedding_A"), key(module, "lora_embedding_B")
    return key(module, "lora_A.weight"), key(module, "lora_B.weight")


def config(
    ranks: Mapping[str, int], *, targets: Sequence[str], whole: Sequence[str], base: str | None, bias: bool,
    task: str | None, transposed: bool, stabilised: bool = False, whole_biases: str = "none",
) -> bytes:  # fmt: skip
    """adapter_config.json for modules of these ranks, which ``targets`` name; ``whole`` names those stored whole.

    alpha equals the rank everywhere, so that the factors' product is added as it is; not where the scaling is
    rank-``stabilised``. ``whole_biases``: which biases of the model are stored whole, in PEFT's words.
    """
    largest = max(ranks.values(), default=1)
    others = {name: rank for name, rank in sorted(ranks.items()) if rank != largest}
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "revision": None,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(targets),
        "modules_to_save": list(whole) or None,
        "lora_dropout": 0.0,
        "bias": whole_biases,
        "lora_bias": bias,
        "fan_in_fan_out": transposed,
        "use_rslora": stabilised,
        "use_dora": False,
        "inference_mode": True,
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def tucker_config(rank: int, *, whole: Sequence[str], base: str) -> bytes:
    """Of a FLoRA adapter, in the same keys as far as it has them; ``rank`` is the largest of its axes."""
    content = {
        "peft_type": "FLORA", "base_model_name_or_path": base, "r": rank, "scale": 1.0,
        "modules_to_save": list(whole) or None, "inference_mode": True,
    }  # fmt: skip
    return (json.dumps(content, indent=2) + "\n").encode()


def task_of(architecture: str | None) -> str | None:
    """PEFT's name for what an architecture is for."""
    return next((task for end, task in _TASKS.items() if (architecture or "").endswith(end)), None)


def short(names: Collection[str], every: Sequence[Module]) -> list[str]:
    """The last parts of the names, and whole names where such a part stands for other modules as well."""
    strangers = {module.last for module in every if module.name not in names}
    parts = {name: name.rpartition(".")[2] for name in names}
    return sorted({name if part in strangers else part for name, part in parts.items()})

"""smelt: merge, compare and verify trained networks in parameter space.

    smelt.merge("recipe.yml", "out")        run a recipe (mergekit's YAML runs unmodified)
    smelt.merge_tensors("ties", [a, b], base)   the same methods on dicts of arrays
    smelt.continue_merge("out", ["new"], "out2")   add a model to what was merged before
    smelt.convert("model", "out")           the same model as safetensors, in another dtype
    smelt.greedy_soup([a, b, c], score)     average from the best down, keeping what helps
    smelt.merge_lora([a, b], "out")         adapters among each other, without their base
    smelt.load("model")                     a lazy mapping name -> tensor
    smelt.check(["a", "b"], base="c")       do these share a backbone, what should I use?
    smelt.methods.names()                   the registry

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import InputRejected, MissingExtra, OperationFailed, SmeltError, UsageError

if TYPE_CHECKING:
    from . import methods
    from .adapters import extract_delta, extract_lora, merge_lora
    from .checkpoint import Checkpoint, load
    from .conversion import convert
    from .diagnosis import check
    from .engine import (
        Artifact,
        Plan,
        Soup,
        choose_lambdas,
        continue_merge,
        greedy_soup,
        leftovers,
        merge,
        merge_tensors,
        plan,
        regmean_plus_plus,
        remove_leftovers,
        reproduce,
        restore_task,
        verify,
    )
    from .stacking import stack
    from .transplant import transplant_tokenizer

__all__ = [
    "Artifact", "Checkpoint", "InputRejected", "MissingExtra", "OperationFailed", "Plan", "SmeltError", "Soup",
    "UsageError", "__version__", "check", "choose_lambdas", "continue_merge", "convert", "extract_delta",
    "extract_lora", "greedy_soup", "leftovers", "load", "merge", "merge_lora", "merge_tensors", "methods", "plan",
    "regmean_plus_plus",
    "remove_leftovers", "reproduce", "restore_task", "stack", "transplant_tokenizer", "verify",
]  # fmt: skip

_HOMES = {
    "Artifact": "engine", "Checkpoint": "checkpoint", "Plan": "engine", "Soup": "engine", "check": "diagnosis",
    "choose_lambdas": "engine", "continue_merge": "engine", "convert": "conversion", "extract_delta": "adapters",
    "extract_lora": "adapters", "greedy_soup": "engine", "leftovers": "engine", "load": "checkpoint",
    "merge": "engine", "merge_lora": "adapters", "merge_tensors": "engine", "plan": "engine",
    "regmean_plus_plus": "engine",
    "remove_leftovers": "engine", "reproduce": "engine", "restore_task": "engine", "stack": "stacking",
    "transplant_tokenizer": "transplant", "verify": "engine",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "methods":
        return importlib.import_module(".methods", __name__)
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'smelt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

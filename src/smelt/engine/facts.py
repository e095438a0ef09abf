"""Do the models compute the same with equal shapes? Heads, rotary settings and ties, from config.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..architecture import comparable_facts
from ..checkpoint import Checkpoint
from ..errors import show
from .findings import Finding, Severity

#: Facts whose difference means another network, although every shape may agree. The others are settings
#: that training may have changed.
_DECISIVE = {
    "model_type", "hidden_size", "attention_heads", "key_value_heads", "head_dim", "tied_embeddings", "quantised",
}  # fmt: skip


def compare_configs(checkpoints: Sequence[Checkpoint]) -> list[Finding]:
    """Compare every config.json with the first one; a fact that one of them does not state is no difference.

    Error ``config-differs`` for model type, widths, heads, ties and quantisation, warning for the rest.
    """
    stated = [(c.label, facts) for c in checkpoints if (facts := comparable_facts(c.config))]
    if not stated:
        return []
    (first, wanted), *others = stated
    return [finding for label, facts in others for finding in _compare(first, wanted, label, facts)]


def _compare(first: str, wanted: dict[str, Any], label: str, facts: dict[str, Any]) -> Iterator[Finding]:
    for fact in sorted(wanted.keys() & facts.keys()):
        if wanted[fact] == facts[fact]:
            continue
        severity: Severity = "error" if fact.rpartition(".")[2] in _DECISIVE else "warning"
        text = (
            f"{show(label)} and {show(first)} differ in {fact.replace('_', ' ')}: {show(facts[fact])} "
            f"and {show(wanted[fact])}"
        )
        values = {"fact": fact, "values": [facts[fact], wanted[fact]]}
        yield Finding(severity, "config-differs", (label, first), text, values)

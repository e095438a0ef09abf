"""The order in which a model's parameters are registered, which files of an optimizer do not state.

It follows the modules as the model's code defines them. The families below define siblings in these orders; a
number comes before the next one, a weight before its bias.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..errors import UsageError, show

#: Siblings in the order of their definition. A set of siblings takes the first line that holds all of them.
_SIBLINGS = tuple(
    line.split()
    for line in (
        "weight bias",
        "model transformer gpt_neox bert roberta encoder decoder lm_head embed_out pooler score classifier qa_outputs",
        "embed_tokens embed_positions layers norm",
        "embed_tokens embed_positions final_layer_norm layers",
        "self_attn mlp block_sparse_moe input_layernorm post_attention_layernorm pre_feedforward_layernorm "
        "post_feedforward_layernorm",
        "self_attn self_attn_layer_norm fc1 fc2 final_layer_norm",
        "q_proj k_proj v_proj o_proj q_norm k_norm",
        "k_proj v_proj q_proj out_proj",
        "o_proj qkv_proj",
        "gate experts shared_expert shared_expert_gate",
        "gate_proj up_proj down_proj",
        "gate_up_proj down_proj",
        "w1 w2 w3",
        "wte wpe h ln_f",
        "ln_1 attn ln_2 mlp",
        "c_attn c_proj",
        "c_fc c_proj",
        "embeddings encoder pooler",
        "word_embeddings position_embeddings token_type_embeddings LayerNorm",
        "attention intermediate output",
        "self output",
        "query key value",
        "dense LayerNorm",
        "embed_in layers final_layer_norm",
        "input_layernorm post_attention_layernorm attention mlp",
        "query_key_value dense",
        "dense_h_to_4h dense_4h_to_h",
    )
)

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def registered(names: Iterable[str]) -> list[str]:
    """``names`` in the order of registration. UsageError where siblings are of no family known here."""
    return list(_walk([(name.split("."), name) for name in names]))


def _walk(entries: Sequence[tuple[list[str], str]]) -> Iterator[str]:
    """Depth first: tensors of a module before those of its children."""
    yield from (name for path, name in sorted(entries, key=lambda e: _rank_last(e[0])) if len(path) == 1)
    groups: dict[str, list[tuple[list[str], str]]] = {}
    for path, name in entries:
        if len(path) > 1:
            groups.setdefault(path[0], []).append((path[1:], name))
    for word in _sorted(list(groups)):
        yield from _walk(groups[word])


def _rank_last(path: list[str]) -> int:
    return path[-1] == "bias"


def _sorted(words: list[str]) -> list[str]:
    if len(words) < 2:
        return words
    if all(word.isdigit() for word in words):
        return sorted(words, key=int)
    line = next((line for line in _SIBLINGS if set(words) <= set(line)), None)
    if line is None:
        raise UsageError(
            f"the order in which a model registers {', '.join(map(show, sorted(words)))} is not known: give the "
            "names of its parameters in that order (order=)"
        )
    return sorted(words, key=line.index)


#: Rules by which trainers set weights apart that are not decayed, newest first.
def decays_by_name(name: str, shape: tuple[int, ...]) -> bool:
    return _NO_DECAY.search(name.lower()) is None


def decays_by_rank(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1


def decays_but_biases(name: str, shape: tuple[int, ...]) -> bool:
    return "bias" not in name


DECAY_RULES: tuple[Callable[[str, tuple[int, ...]], bool], ...] = (decays_by_name, decays_by_rank, decays_but_biases)

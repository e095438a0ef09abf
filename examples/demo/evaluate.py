"""How well one model does on the held-out passages of one domain.

Exact match needs no generation: greedy decoding reproduces a stretch of text exactly when every token of it
is the model's first choice after the true tokens before it, so one forward pass answers for all stretches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import Domain
from .model import CONTEXT

UNSCORED = -1


@dataclass(frozen=True)
class Score:
    """Mean loss in nats per scored token, and the share of scored stretches predicted exactly (0 to 1)."""

    loss: float
    exact: float


@dataclass(frozen=True)
class Test:
    """The held-out passages of a domain as tokens.

    tokens: int64 (passages, CONTEXT), padded on the right, which a causal model never looks at.
    stretch: int64 of the same shape, the number of the stretch that a token belongs to, or UNSCORED.
    """

    tokens: Tensor
    stretch: Tensor


def prepare(domain: Domain, tokenizer: PreTrainedTokenizerFast) -> Test:
    """Encodes the held-out passages and numbers their scored stretches."""
    tokens = torch.zeros(len(domain.held_out), CONTEXT, dtype=torch.int64)
    stretch = torch.full_like(tokens, UNSCORED)
    count = 0
    for row, passage in enumerate(domain.held_out):
        encoded = tokenizer(passage, truncation=True, max_length=CONTEXT, return_offsets_mapping=True)
        starts = [start for start, _ in encoded["offset_mapping"]]
        tokens[row, : len(starts)] = torch.tensor(encoded["input_ids"])
        for match in domain.scored.finditer(passage):
            for column, start in enumerate(starts):
                if match.start() <= start < match.end():
                    stretch[row, column] = count
            count += 1
    return Test(tokens, stretch)


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, test: Test) -> Score:
    """Scores `model` (any dtype; computed in float32) on a prepared test."""
    model = model.float().eval()
    logits = torch.cat([model(input_ids=part, use_cache=False).logits for part in test.tokens.split(16)])
    predicted, wanted, stretch = logits[:, :-1].flatten(0, 1), test.tokens[:, 1:].flatten(), test.stretch[:, 1:].flatten()
    scored = stretch != UNSCORED
    predicted, wanted, stretch = predicted[scored], wanted[scored], stretch[scored]
    missed = torch.unique(stretch[predicted.argmax(dim=-1) != wanted])
    exact = 1 - len(missed) / len(torch.unique(stretch))
    return Score(functional.cross_entropy(predicted, wanted).item(), exact)

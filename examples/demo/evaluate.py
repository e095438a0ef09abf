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
        owner = [UNSCORED] * len(passage)
        for count, match in enumerate(domain.scored.finditer(passage), start=count + 1):
            owner[match.start() : match.end()] = [count] * (match.end() - match.start())
        length = len(encoded["input_ids"])
        tokens[row, :length] = torch.tensor(encoded["input_ids"])
        stretch[row, :length] = torch.tensor([owner[start] for start, _ in encoded["offset_mapping"]])
    return Test(tokens, stretch)


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, test: Test) -> Score:
    """Scores `model` on a prepared test."""
    model.eval()
    logits = torch.cat([model(input_ids=part, use_cache=False).logits for part in test.tokens.split(16)])
    scored = test.stretch[:, 1:] != UNSCORED
    predicted, wanted = logits[:, :-1][scored], test.tokens[:, 1:][scored]
    stretch = test.stretch[:, 1:][scored]
    missed = stretch[predicted.argmax(dim=-1) != wanted].unique()
    exact = 1 - len(missed) / len(stretch.unique())
    return Score(functional.cross_entropy(predicted, wanted).item(), exact)

"""How well one model does on the held-out passages of one domain.

Exact match needs no generation: greedy decoding reproduces a stretch of text exactly when every token of it
is the model's first choice after the true tokens before it, so one forward pass answers for all stretches.
"""

from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import Domain
from .model import CONTEXT
from .results import Score

UNSCORED = -1


@dataclass(frozen=True)
class HeldOut:
    """The held-out passages of a domain as tokens.

    tokens: int64 (passages, CONTEXT), padded on the right, which a causal model never looks at.
    stretch: int64 of the same shape, the number of the stretch that a token belongs to, or UNSCORED.
    """

    tokens: Tensor
    stretch: Tensor


def prepare(domain: Domain, tokenizer: PreTrainedTokenizerFast) -> HeldOut:
    """Encodes the held-out passages and numbers their scored stretches."""
    tokens = torch.zeros(len(domain.held_out), CONTEXT, dtype=torch.int64)
    stretch = torch.full_like(tokens, UNSCORED)
    numbers = count()
    for row, passage in enumerate(domain.held_out):
        encoded = tokenizer(passage, truncation=True, max_length=CONTEXT, return_offsets_mapping=True)
        owner = [UNSCORED] * len(passage)
        for number, match in zip(numbers, domain.scored.finditer(passage), strict=False):
            owner[match.start() : match.end()] = [number] * (match.end() - match.start())
        length = len(encoded["input_ids"])
        tokens[row, :length] = torch.tensor(encoded["input_ids"])
        stretch[row, :length] = torch.tensor([owner[start] for start, _ in encoded["offset_mapping"]])
    return HeldOut(tokens, stretch)


def evaluate(model: LlamaForCausalLM, held_out: HeldOut) -> Score:
    """Scores `model` on a prepared held_out."""
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(input_ids=part, use_cache=False).logits for part in held_out.tokens.split(16)])
    scored = held_out.stretch[:, 1:] != UNSCORED
    predicted, wanted = logits[:, :-1][scored], held_out.tokens[:, 1:][scored]
    stretch = held_out.stretch[:, 1:][scored]
    missed = stretch[predicted.argmax(dim=-1) != wanted].unique()
    exact = 1 - len(missed) / len(stretch.unique())
    return Score(functional.cross_entropy(predicted, wanted).item(), exact)

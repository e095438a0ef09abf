"""One base, trained on a mixture of all domains, and one expert fine-tuned from it for each domain.

Two habits of careful fine-tuning make experts that merge well: a share of each batch replays the base's own
mixture, so that an expert forgets little, and the embeddings stay those of the base.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import Domain
from .model import CONTEXT, new_model

# Windows of each domain in a batch of sixteen: much English, and a first acquaintance with all else.
MIXTURE = {"prose": 9, "code": 1, "roman": 2, "names": 4}
REPLAY = {"prose": 1, "code": 1, "roman": 1, "names": 1}
OWN = 12
BASE_STEPS = 500
EXPERT_STEPS = 200


@dataclass(frozen=True)
class Corpus:
    """The training text of every domain as one int64 sequence of tokens."""

    streams: Mapping[str, Tensor]

    def batch(self, mixture: Mapping[str, int], random: torch.Generator) -> Tensor:
        """int64 (windows, CONTEXT): windows at random places of the domains' text."""
        return torch.stack(
            [window(self.streams[name], random) for name, count in mixture.items() for _ in range(count)]
        )


def window(stream: Tensor, random: torch.Generator) -> Tensor:
    start = int(torch.randint(len(stream) - CONTEXT, (1,), generator=random))
    return stream[start : start + CONTEXT]


def encode(domains: Sequence[Domain], tokenizer: PreTrainedTokenizerFast) -> Corpus:
    """Tokenises the training text of all domains."""
    return Corpus({domain.name: torch.tensor(tokenizer(domain.train)["input_ids"]) for domain in domains})


def train_base(corpus: Corpus) -> LlamaForCausalLM:
    """Pre-trains on the mixture. Muon reaches in 500 steps what AdamW alone needs thousands for."""
    model = new_model(seed=0)
    matrices = [weight for name, weight in model.named_parameters() if is_matrix(name)]
    others = [weight for name, weight in model.named_parameters() if not is_matrix(name)]
    optimizers = [
        Muon(matrices, lr=0.03, weight_decay=0.01),
        AdamW(others, lr=0.005, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    descend(model, optimizers, corpus, MIXTURE, BASE_STEPS, warmup=40, seed=1)
    return model


def is_matrix(name: str) -> bool:
    """Whether a weight is a matrix of a layer: neither a norm nor the embedding."""
    return "norm" not in name and "embed" not in name


def train_expert(model: LlamaForCausalLM, domain: str, corpus: Corpus, seed: int) -> LlamaForCausalLM:
    """Fine-tunes a copy of the base (`model`, changed in place) on one domain."""
    model.get_input_embeddings().requires_grad_(False)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = AdamW(weights, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.0)
    mixture = {**REPLAY, domain: REPLAY[domain] + OWN}
    descend(model, [optimizer], corpus, mixture, EXPERT_STEPS, warmup=10, seed=seed)
    return model


def descend(
    model: LlamaForCausalLM,
    optimizers: Sequence[Optimizer],
    corpus: Corpus,
    mixture: Mapping[str, int],
    steps: int,
    warmup: int,
    seed: int,
) -> None:
    """The training loop: next-token loss, gradient clipping, warm-up and linear decay."""

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * max(0.02, 1 - step / steps)

    random = torch.Generator().manual_seed(seed)
    schedules = [LambdaLR(optimizer, rate) for optimizer in optimizers]
    model.train()
    for _ in range(steps):
        tokens = corpus.batch(mixture, random)
        model.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for step in (*optimizers, *schedules):
            step.step()

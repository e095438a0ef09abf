"""What a transplant was asked for, checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import UsageError, show
from ..recipe import did_you_mean
from .matching import Rules
from .neighbours import SCHEMES

METHODS = ("omp", "common_interpolation", "subword", "mean", "zero", "randn", "john_hewitt", "landmark_pca")
SUBWORD_METHODS = ("mean", "sum", "weighted_mean", "first_last")
WHERE = ("no", "yes", "embed", "lm_head")
MATCHES = ("marker", "bytes")

#: Option -> the methods that heed it.
_HEEDED = {
    "k": ("omp", "common_interpolation"),
    "cosine_similarity": ("common_interpolation",),
    "weight_scheme": ("common_interpolation",),
    "subword_method": ("subword",),
}


@dataclass(frozen=True)
class Options:
    """The options of :func:`smelt.transplant_tokenizer`, as they are described there; None where not given."""

    method: str
    k: int | None
    cosine_similarity: bool | None
    weight_scheme: str | None
    subword_method: str | None
    match: str
    prefix_match: str
    byte_match: str
    magikarp: bool
    new_vocab_noise: float
    new_vocab_scale: float
    pad_to_multiple_of: int
    seed: int

    def __post_init__(self) -> None:
        UsageError.gather(self._problems())

    def _problems(self) -> Iterator[str]:
        choices = {
            "method": METHODS, "match": MATCHES, "prefix_match": WHERE, "byte_match": WHERE,
            "weight_scheme": SCHEMES, "subword_method": SUBWORD_METHODS,
        }  # fmt: skip
        for name, known in choices.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                hint = did_you_mean(str(value), known) or f"; there are {', '.join(known)}"
                yield f"{name} {show(value)} is not known{hint}"
        for name, methods in _HEEDED.items():
            if getattr(self, name) is not None and self.method not in methods:
                yield f"{name} has no effect with the method {self.method}: it belongs to {' and '.join(methods)}"
        if self.k is not None and self.k < 1:
            yield f"k must be at least 1, not {self.k}"
        if self.pad_to_multiple_of < 1:
            yield f"pad_to_multiple_of must be at least 1, not {self.pad_to_multiple_of}"
        if not 0 <= self.new_vocab_noise < float("inf"):
            yield f"new_vocab_noise must be 0 or more, not {self.new_vocab_noise}"
        if self.match == "bytes" and self.byte_match != "no":
            yield "byte_match has no effect when all tokens are matched by their bytes"

    def of_bias(self) -> Options:
        """The same for the head's bias, where what is unknown is zero."""
        return replace(
            self, method="zero", k=None, cosine_similarity=None, weight_scheme=None, subword_method=None,
            magikarp=False, new_vocab_noise=0.0,
        )  # fmt: skip

    @property
    def count(self) -> int:
        return 64 if self.k is None else self.k

    @property
    def is_cosine(self) -> bool:
        return bool(self.cosine_similarity)

    @property
    def scheme(self) -> str:
        return self.weight_scheme or SCHEMES[0]

    @property
    def pieces(self) -> str:
        return self.subword_method or SUBWORD_METHODS[0]

    def rules(self, head: bool) -> Rules:
        """How tokens are matched in the embedding or the head."""
        here = ("yes", "lm_head" if head else "embed")
        return Rules(self.match == "bytes", self.byte_match in here, self.prefix_match in here)

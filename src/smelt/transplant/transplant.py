"""The front door: a model with another model's tokenizer, published as a merge is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from ..checkpoint import TensorInfo, load, plan_shards
from ..engine.artefact import Source, Work, open_models, publish
from ..engine.device import nonfinite
from ..engine.execute import usable_cores
from ..engine.inputs import Input
from ..engine.layout import natural_key
from ..engine.operands import CheckpointOperand
from ..engine.options import SHARD_SIZE
from ..engine.progress import Progress
from ..engine.run import Artifact
from ..engine.whole import read_whole
from ..errors import InputRejected, OperationFailed, show
from ..recipe import parse_size
from .config import documents
from .matrices import Array, Transplanted, transplanted
from .options import Options
from .vocabulary import Vocabulary, read_vocabulary


def transplant_tokenizer(
    model: Source, donor: Source, out: str | Path, *, method: str = "omp", k: int | None = None,
    cosine_similarity: bool | None = None, weight_scheme: str | None = None, subword_method: str | None = None,
    match: str = "marker", prefix_match: str = "no", byte_match: str = "no", magikarp: bool = False,
    new_vocab_noise: float = 0.0, new_vocab_scale: float = 1.0, pad_to_multiple_of: int = 1, seed: int = 0,
    allow_pickle: bool = False, shard_size: str | int = SHARD_SIZE, threads: int | None = None,
    progress: Progress | None = None,
) -> Artifact:  # fmt: skip
    """Publish ``model`` with the tokenizer of ``donor`` as the new folder ``out``.

    Rows of tokens that both have are copied; the others are approximated. Everything but embedding and head
    is copied bit by bit. Both models' embeddings and heads are held in memory.

    Parameters
    ----------
    model, donor: folders or hub ids with a tokenizer.json.
    method: "omp" (sparse combinations of shared tokens, by orthogonal matching pursuit),
        "common_interpolation" (of the nearest shared tokens), "subword" (from the pieces that the model's own
        tokenizer makes of the token), "mean", "zero", "randn", "john_hewitt" or "landmark_pca".
    k: how many shared tokens to combine (omp, common_interpolation; default 64).
    cosine_similarity, weight_scheme: of common_interpolation: nearest by cosine; "distance_proportional"
        (default), "barycentric" or "least_squares".
    subword_method: "mean" (default), "sum", "weighted_mean" or "first_last".
    match: compare tokens as they are written, but for the mark of a word's beginning ("marker"), or by the
        "bytes" that they stand for.
    prefix_match, byte_match: "no", "yes", or only in "embed" or "lm_head": take the row of the longest token
        that a token begins with; of the byte token <0xNN> for a single character, and the reverse.
    magikarp: approximate tokens whose row in the model looks untrained.
    new_vocab_noise, new_vocab_scale: add normal noise of this deviation to approximated rows, then multiply.
    pad_to_multiple_of: add rows that no token uses, equal to the mean of all.
    seed: of the random methods and the noise.
    allow_pickle: read pickled weights, too, where there are no others.

    Raises UsageError, InputRejected or OperationFailed; then ``out`` does not exist.
    """
    out = Path(out)
    options = Options(
        method, k, cosine_similarity, weight_scheme, subword_method, match, prefix_match, byte_match, magikarp,
        new_vocab_noise, new_vocab_scale, pad_to_multiple_of, seed,
    )  # fmt: skip
    size = parse_size(shard_size)
    opened = open_models(allow_pickle, model=model, donor=donor)
    work = Work("tokenizer_transplant", asdict(options), opened, seed)
    with work.towards(out):
        transplant = _Transplant(work, options, threads or usable_cores())
        tensors = transplant.tensors()
        parts = work.inputs[0].checkpoint.parts
        infos = [TensorInfo(name, transplant.dtype(name), operand.shape) for name, operand in tensors.items()]
        shards = plan_shards(infos, size, parts=parts)
        files = transplant.files(tensors)
        return publish(out, work, tensors, files, shards=shards, threads=threads, progress=progress)


class _Transplant:
    """Two opened models, and what the new one consists of."""

    def __init__(self, work: Work, options: Options, threads: int) -> None:
        self._work, self._options, self._threads = work, options, threads
        self._model, self._donor = work.inputs
        InputRejected.gather([*_problems(self._model), *_problems(self._donor)])
        self._vocabularies = read_vocabulary(self._model.checkpoint), read_vocabulary(self._donor.checkpoint)
        work.notices += _remarks(*self._vocabularies)

    def tensors(self) -> dict[str, CheckpointOperand]:
        """All tensors of the model; those with a row for each token made anew."""
        structure = self._model.structure
        names = sorted(self._model.checkpoint.tensors, key=natural_key)
        found = {name: self._work.operand(self._model, name) for name in names}
        made = {name: self._made(name) for name in names if structure.vocabulary_axis(name) is not None}
        for group in structure.tied_groups:
            made |= dict.fromkeys(group, made[structure.vocabulary.embeddings[0]])
        arrays = load({name: rows.rows for name, rows in made.items()})
        self._work.notices += [f"{name}: {rows}" for name, rows in made.items()]
        return found | {name: CheckpointOperand(arrays, name) for name in made}

    def dtype(self, name: str) -> str:
        """In which a tensor of the model is written."""
        return self._model.checkpoint.tensors[name].native

    def _made(self, name: str) -> Transplanted:
        """An embedding, a head, or the head's bias (whose unknown rows are zero)."""
        head = name not in self._model.structure.vocabulary.embeddings
        own = self._values(self._model, name)
        dtype = self.dtype(name)
        if own.ndim == 2:
            donor = self._values(self._donor, _counterpart(self._donor, head))
            return transplanted(
                name, dtype, own, donor, self._vocabularies, self._options, head=head, threads=self._threads
            )
        options = self._options.of_bias()
        column, nothing = own[:, None], np.zeros((self._vocabularies[1].size, 1))
        made = transplanted(name, dtype, column, nothing, self._vocabularies, options, head=head, threads=1)
        return replace(made, rows=made.rows[:, 0])

    def _values(self, item: Input, name: str) -> Array:
        values = read_whole(self._work.operand(item, name))
        if nonfinite(values, item.checkpoint.tensors[name].dtype).any():
            raise OperationFailed(f"{item.label}: tensor {show(name)} holds NaN or Inf")
        return values

    def files(self, tensors: Mapping[str, CheckpointOperand]) -> dict[str, bytes]:
        """The donor's tokenizer and the model's configs with its vocabulary."""
        rows = tensors[self._model.structure.vocabulary.embeddings[0]].shape[0]
        files, changes = documents(self._model, self._donor, rows)
        self._work.notices += changes
        return files


def _problems(item: Input) -> Iterator[str]:
    """What makes it unclear which rows are tokens."""
    vocabulary = item.structure.vocabulary
    for role, names, least in (("embedding", vocabulary.embeddings, 1), ("head", vocabulary.heads, 0)):
        if not least <= len(names) <= 1:
            listed = ", ".join(map(show, names))
            yield f"{item.label}: {len(names)} tensors with the role {role} ({listed}), expected one"
        yield from (
            f"{item.label}: tensor {show(name)} has its tokens in columns, which is not understood"
            for name in names
            if item.structure.vocabulary_axis(name)
        )


def _counterpart(item: Input, head: bool) -> str:
    """The donor's head or embedding; where the head is tied, the embedding is both."""
    vocabulary = item.structure.vocabulary
    return vocabulary.heads[0] if head and vocabulary.heads else vocabulary.embeddings[0]


def _remarks(own: Vocabulary, donor: Vocabulary) -> Iterator[str]:
    """What does damage that no approximation repairs."""
    lengths = [_longest_number(vocabulary) for vocabulary in (own, donor)]
    if lengths[0] != lengths[1]:
        yield (
            f"numbers are cut differently: tokens of up to {lengths[0]} digits before, {lengths[1]} after; "
            "expect the model to calculate worse"
        )


def _longest_number(vocabulary: Vocabulary) -> int:
    """The digits of the longest token that is a number."""
    texts = (vocabulary.text_of(token).strip() for token in vocabulary.ids if token[-1:].isdigit())
    return max((len(text) for text in texts if text.isascii() and text.isdigit()), default=0)

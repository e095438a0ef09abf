"""`smelt convert`: a checkpoint in another form. It is a merge of one model by passthrough."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine import merge

if TYPE_CHECKING:
    from .engine import Artifact
    from .engine.progress import Progress

#: What the recipe calls a model that has no path.
_NAMELESS = "model"


def convert(
    source: Any, out: str | Path, *, dtype: str | None = None, format: str = "safetensors", scales: str | None = None,
    progress: Progress | None = None, **options: Any,
) -> Artifact:  # fmt: skip
    """Write a checkpoint in another form, with its config and the files beside it, as the new folder ``out``.

    Parameters
    ----------
    source: whatever :func:`smelt.load` reads.
    out: a folder that does not exist yet, or is empty; it appears whole, or not at all.
    dtype: what floating tensors become, rounded to nearest even ("bfloat16", "float16", "float32", "float64");
        by default each keeps its own. A value that overflows is an error that names the tensor. GGUF takes
        "q8_0", too: matrices in blocks of eight bits; safetensors "fp8_block" and "fp8_tensor": linear layers in
        FP8 (E4M3), with a scale per 128 x 128 elements, or one.
    format: "safetensors", or "gguf": one file that holds config and tokenizer itself.
    scales: of FP8: "fresh" ones, from the values, or the "base"'s: those that the source has, which must be FP8 of
        the same kind.
    options: allow_pickle, shard_size, threads, memory, on_nonfinite ("error", "warn", "allow"), as for
        :func:`smelt.merge`.

    Raises UsageError, InputRejected or OperationFailed; then ``out`` does not exist.
    """
    name = str(source) if isinstance(source, str | Path) else _NAMELESS
    recipe: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": name}]}
    recipe["output"] = {"format": format} | ({} if dtype is None else {"dtype": dtype})
    recipe["output"] |= {} if scales is None else {"scales": scales}
    models = {} if isinstance(source, str | Path) else {name: source}
    return merge(recipe, out, models=models, progress=progress, card=False, **options)

"""`smelt convert`: a checkpoint in another form. It is a merge of one model by passthrough."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine import merge, plan
from .engine.publish import check_destination

if TYPE_CHECKING:
    from .engine import Artifact, Plan
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
    recipe, models = _recipe(source, dtype, format, scales)
    return merge(recipe, out, models=models, progress=progress, card=False, **options)


def plan_conversion(
    source: Any, out: str | Path, *, dtype: str | None = None, format: str = "safetensors", scales: str | None = None,
    **options: Any,
) -> Plan:  # fmt: skip
    """What :func:`convert` would do with these options: everything is checked, and nothing written. To be closed."""
    recipe, models = _recipe(source, dtype, format, scales)
    made = plan(recipe, models=models, card=False, **options)
    try:
        check_destination(Path(out), made.inputs.folders())
    except BaseException:
        made.close()
        raise
    return made


def _recipe(
    source: Any, dtype: str | None, format: str, scales: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """A merge of one model by passthrough, and the model where it has no path."""
    name = str(source) if isinstance(source, str | Path) else _NAMELESS
    recipe: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": name}]}
    recipe["output"] = {"format": format} | ({} if dtype is None else {"dtype": dtype})
    recipe["output"] |= {} if scales is None else {"scales": scales}
    return recipe, {} if isinstance(source, str | Path) else {name: source}

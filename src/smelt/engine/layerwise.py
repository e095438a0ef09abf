"""RegMean++: a network merged block by block, each on what the merged blocks below it make of the inputs.

Nguyen et al., "RegMean++: enhancing effectiveness and generalization of regression mean for model merging", 2025,
https://arxiv.org/abs/2508.03121. RegMean (:mod:`smelt.methods.regmean`) fits the outputs of all models on the inputs
that their layers saw; here every model's own block sees what the merged network will feed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UsageError, show
from .live import arrays_of
from .memory import Arrays, merge_tensors

#: (all tensors of a model, what the block before returned) -> what the next one takes, and matrix -> its inputs.
Block = Callable[[Mapping[str, Any], Any], tuple[Any, Mapping[str, Any]]]


def regmean_plus_plus(
    models: Sequence[Any], inputs: Sequence[Iterable[Any]], blocks: Sequence[Block], *,
    reduce_non_diagonal_ratio: float = 0.9, weights: Sequence[float] | None = None, threads: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Merge models of one architecture by RegMean++, in memory.

    Parameters
    ----------
    models: one dict per model, name -> array of numpy or torch, or a ``torch.nn.Module``.
    inputs: for each model some batches of its task: what the first block takes. No labels.
    blocks: the network in the order of its forward pass, as functions ``block(tensors, x)`` that run a part of it
        with the tensors of one model, by name. ``x`` is what the block before returned. They return what the next
        block takes, and the inputs of each matrix that is to be merged: {name: array (..., in)}, without padding.
        Inside a block the activations are the model's own.
    reduce_non_diagonal_ratio: factor off the diagonal of each Gram matrix.
    weights: of the models, equal by default.

    Returns the merged tensors; those that no block names are averaged beforehand. The inputs of a block are held for
    all models at once.

    With a torch module whose ``layers`` follow each other, and batches of what the first of them takes::

        def block(name):
            layer = network.get_submodule(name)
            linear = {part: m for part, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
            def run(tensors, x):
                seen = {}
                see = lambda key: lambda _, given: seen.update({key: given[0]})
                hooks = [m.register_forward_pre_hook(see(f"{name}.{part}.weight")) for part, m in linear.items()]
                own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
                with torch.no_grad():
                    out = torch.func.functional_call(layer, own, (x,))
                for hook in hooks:
                    hook.remove()
                return out, seen
            return run

        smelt.regmean_plus_plus(models, inputs, [block(f"layers.{i}") for i in range(len(network.layers))])

    Raises UsageError, InputRejected or OperationFailed as :func:`smelt.merge_tensors` does.
    """
    if len(inputs) != len(models):
        raise UsageError(f"regmean_plus_plus: inputs of {len(inputs)} models for {len(models)} models")
    arrays = [arrays_of(model) for model in models]
    each = {"weight": [1.0] * len(models) if weights is None else weights}
    merged = merge_tensors("linear", arrays, per_model=each, threads=threads)
    batches = [list(own) for own in inputs]
    for block in blocks:
        grams = [_grams(block, own, x) for own, x in zip(arrays, batches, strict=True)]
        if names := _names(grams):
            merged |= merge_tensors(
                "regmean", [{name: own[name] for name in names} for own in arrays], per_model=each, threads=threads,
                statistics=[{"gram": gram} for gram in grams],
                parameters={"reduce_non_diagonal_ratio": reduce_non_diagonal_ratio},
            )  # fmt: skip
        placed = {name: _beside(array, arrays[0].get(name)) for name, array in merged.items()}
        batches = [[block(placed, x)[0] for x in own] for own in batches]
    return merged


def _names(grams: Sequence[Arrays]) -> list[str]:
    """The matrices that a block has named, the same for all models and all of them there."""
    common = set.intersection(*map(set, grams))
    if odd := sorted(set().union(*grams) - common):
        raise UsageError(f"regmean_plus_plus: a block tells the inputs of {show(odd[0])} for some of the models only")
    return sorted(common)


def _grams(block: Block, tensors: Arrays, batches: Iterable[Any]) -> dict[str, Any]:
    """The mean of x x^T over all inputs x of each matrix, in fp64."""
    sums: dict[str, Any] = {}
    rows: dict[str, int] = {}
    for batch in batches:
        for name, seen in block(tensors, batch)[1].items():
            flat = _in_double(seen.reshape(-1, seen.shape[-1]))
            sums[name], rows[name] = sums.get(name, 0) + flat.T @ flat, rows.get(name, 0) + len(flat)
    return {name: total / max(1, rows[name]) for name, total in sums.items()}


def _in_double(array: Any) -> Any:
    return array.detach().double() if hasattr(array, "detach") else np.asarray(array, np.float64)


def _beside(array: Any, like: Any) -> Any:
    """A merged torch tensor on the device of the model's."""
    return array.to(like.device) if hasattr(array, "to") and hasattr(like, "device") else array

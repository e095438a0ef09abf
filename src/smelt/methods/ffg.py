"""FFG, fast Fisher grafting: keep the changes that matter to the loss, take back the others.

Mahdavinia, Mahdavi, Mireshghallah, Mahdavi, "Harnessing optimization dynamics for curvature-informed model
merging", 2025, https://arxiv.org/abs/2509.11167. Taking back the change tau of one parameter costs about
1/2 v tau^2 at an optimum whose curvature is v (Adam's second moment, or a Fisher: ``statistics``):

    s = v tau^2 (``metric: magnitude``: |tau|),   theta = theta_1 where s is large, else theta_0

Large is the top ``density`` of all elements, over the whole model or each tensor (``scope``), or everything
from ``threshold`` on (``select: threshold``). Elements equal to the density's bar are all kept, those with
s = 0 never. What is kept has the model's bits, the rest the base's, unless ``rescale: norm`` gives the kept
change the operator norm of the whole one. Ranks are taken of sqrt(v) |tau|, which does not underflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from math import ceil
from typing import Any

import numpy as np

from ..kernels.program import Copy, Rank, call
from ..kernels.vocabulary import sqrt, where
from .curvature import CITATION, CURVATURE, compressed, restored
from .registry import EXCLUDE, Method, Parameter, Steps
from .tensors import Model, Tensor


def score(base: Any, model: Any, curvature: Any, root: bool) -> Any:
    """The saliency, or its root."""
    tau = model - base
    saliency = curvature * (tau * tau)
    if root:
        saliency = sqrt(curvature) * abs(tau)
    return saliency


def grafted(base: Any, model: Any, curvature: Any, threshold: Any, root: bool) -> Any:
    return where(score(base, model, curvature, root) >= threshold, model, base)


def rescaled(base: Any, model: Any, curvature: Any, threshold: Any, ratio: Any, root: bool) -> Any:
    return base + ratio * kept_change(base, model, curvature, threshold, root)


def kept_change(base: Any, model: Any, curvature: Any, threshold: Any, root: bool) -> Any:
    return where(score(base, model, curvature, root) >= threshold, model - base, 0)


def merge(tensor: Tensor) -> Steps:
    assert tensor.base is not None
    if not _covered(tensor) or tensor["density"] in (0.0, 1.0):
        keep = tensor["density"] == 1 if _covered(tensor) else tensor["missing"] == "keep"
        return Copy(tensor.models[0] if keep else tensor.base)
    curvatures, threshold = tensor.survey or (yield from _selected((tensor,), tensor))
    curvature, root = curvatures[tensor.name], _by_root(tensor)
    chosen = {"base": tensor.base, "model": tensor.models[0], "threshold": threshold, "root": root}
    if tensor["rescale"] == "none":
        return call(grafted, curvature=curvature, **chosen)
    ratio = yield from restored(tensor, (curvature,), (threshold,), partial(kept_change, root=root), 0.0, 64)
    return call(rescaled, curvature=curvature, ratio=ratio[0], **chosen)


def _covered(tensor: Tensor) -> bool:
    return tensor["metric"] == "magnitude" or "exp_avg_sq" in tensor.statistics


def _by_root(view: Tensor | Model) -> bool:
    return bool(view["select"] == "density" or view["metric"] == "magnitude")


def survey(model: Model) -> Steps:
    """Curvatures by tensor and the bar of the whole model."""
    if model["select"] == "threshold" or model["scope"] == "tensor" or model["density"] in (0.0, 1.0):
        return None
    return (yield from _selected(tuple(filter(_covered, model.tensors)), model))


def _selected(tensors: Sequence[Tensor], view: Tensor | Model) -> Steps:
    """(tensor name -> curvature, what a score must reach) for ``tensors`` together."""
    found: Sequence[Any] = (1.0,) * len(tensors)
    if view["metric"] == "fisher":
        given = [tensor.statistics["exp_avg_sq"][0] for tensor in tensors]
        found = yield from compressed(given, (view["rank1"],) * len(given), (0,) * len(given))
    threshold = view["threshold"]
    if view["select"] == "density":
        threshold = yield from _bar(tensors, found, view["density"])
    return {tensor.name: curvature for tensor, curvature in zip(tensors, found, strict=True)}, threshold


def _bar(tensors: Sequence[Tensor], curvatures: Sequence[Any], density: float) -> Steps:
    """The smallest score that is kept: never 0."""
    total = sum(tensor.count for tensor in tensors)
    calls = tuple(
        call(score, base=tensor.base, model=tensor.models[0], curvature=curvature, root=True)
        for tensor, curvature in zip(tensors, curvatures, strict=True)
    )
    keep = ceil(Fraction(str(density)) * total)
    (bar,) = yield (Rank(calls, total - keep + 1),)
    return bar if bar > 0 else float(np.finfo(np.float32).smallest_subnormal)


def passes(parameters: dict[str, Any]) -> tuple[int, int]:
    ranked = int(parameters["select"] == "density") + int(parameters["rank1"])
    restoring = 30 if parameters["rescale"] == "norm" else 0
    whole = parameters["scope"] == "model" and parameters["select"] == "density"
    return (ranked, restoring) if whole else (0, ranked + restoring)


_FISHER = ("metric", ("fisher",))

METHODS = (
    Method(
        name="ffg",
        title="FFG, fast Fisher grafting",
        summary="keep the changes that matter by curvature, revert the rest",
        advice="For one fine-tune, before it is merged: the least density at which it keeps its skill, 0.1-0.5.",
        citation=CITATION,
        merge=merge,
        survey=survey,
        passes=passes,
        searches=lambda tensor: 1,
        max_models=1,
        parameters=(
            Parameter("select", "str", "density", "keep a share, or what reaches a threshold",
                      choices=("density", "threshold"), mergekit=False),
            Parameter("density", "float", 0.3, "share of all elements that is kept", low=0, high=1, mergekit=False,
                      when=("select", ("density",))),
            Parameter("threshold", "float", 0.0, "least score that is kept, in units of v tau^2", low=0,
                      mergekit=False, when=("select", ("threshold",))),
            Parameter("metric", "str", "fisher", "score: v tau^2, or |tau|", choices=("fisher", "magnitude"),
                      mergekit=False),
            Parameter("scope", "str", "model", "whether the share spans a tensor or the whole model",
                      choices=("model", "tensor"), mergekit=False, when=("select", ("density",))),
            Parameter("rank1", "bool", False, "curvature of matrices from its sums of rows and columns",
                      mergekit=False, when=_FISHER),
            Parameter("rescale", "str", "none", "give the kept change the operator norm of the whole one",
                      choices=("none", "norm"), mergekit=False),
            Parameter("missing", "str", "error", "tensors without curvature: refuse, the model's, or the base's",
                      choices=("error", "keep", "base"), mergekit=False, when=_FISHER),
            EXCLUDE,
        ),
        statistics=(replace(CURVATURE, when=_FISHER),),
    ),
)  # fmt: skip

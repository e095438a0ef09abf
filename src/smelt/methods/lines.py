"""LiNeS: scale a task vector more the deeper its layer, for one model or after any other method.

Wang et al., "LiNeS: post-training layer scaling prevents forgetting and enhances model merging", ICLR 2025,
https://arxiv.org/abs/2410.17146.

    c(l) = alpha + beta l / (L - 1)                for layer l of L, and alpha outside of the layers
    theta = theta_0 + c(l) (theta_M - theta_0)     theta_M: the model, or what another method merged

For one model beta is 1 - alpha: the last layer keeps its whole update. After another method alpha is, unless
given, |sum_i tau_i| / |tau_M| / n over all elements, in the L1 norm of the authors' code: shallow layers are
averaged, deep ones summed more strongly. A stack of one layer counts as the last; each stack of a model with
several has its own axis.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import numpy as np

from ..errors import UsageError
from ..kernels.program import Call, Output, Request, Rows, Totals, Whole, call, then
from .registry import EXCLUDE, REQUIRED, Citation, Method, Parameter, Steps
from .tensors import Model, Tensor


def scaled(merged: Any, lines_base: Any, lines_factor: Any) -> Any:
    return lines_base + lines_factor * (merged - lines_base)


def lengths(merged: Any, lines_base: Any, lines_models: Any) -> Any:
    """|tau_M| and |sum_i tau_i|."""
    total = 0
    for model in lines_models:
        total += model - lines_base
    return (abs(merged - lines_base), abs(total))


def squares(merged: Any, lines_base: Any, lines_models: Any) -> Any:
    total = 0
    for model in lines_models:
        total += model - lines_base
    tau = merged - lines_base
    return (tau * tau, total * total)


@dataclass(frozen=True)
class Lines:
    """How a merged task vector is scaled; ``alpha`` None finds it from the norms."""

    alpha: float | None
    beta: float
    norm: str = "l1"
    outside: str = "alpha"

    def factor(self, tensor: Tensor, alpha: float) -> float:
        """c of the tensor's layer."""
        depth = tensor.role.depth if tensor.role is not None else None
        if depth is not None:
            return alpha + self.beta * depth
        return 1.0 if self.outside == "one" else alpha


# --- after another method -------------------------------------------------------------------------------


def wrapped(method: Method, lines: Lines) -> Method:
    """``method`` with its task vector scaled. UsageError where it has none."""
    if method.base == "ignored":
        raise UsageError(
            f"lines scales task vectors, which {method.name} has not: take a method with a base "
            "(task_arithmetic with normalize for an average)"
        )

    def survey(model: Model) -> Steps:
        known = (yield from method.survey(model)) if method.survey is not None else None
        if lines.alpha is not None:
            return known, lines.alpha
        alpha = yield from _alpha(method, [replace(tensor, survey=known) for tensor in model.tensors], lines.norm)
        return known, alpha

    def merge(tensor: Tensor) -> Steps | Output:
        known, alpha = tensor.survey or (None, lines.alpha or 1.0)
        begun = method.merge(replace(tensor, survey=known))
        factor = lines.factor(tensor, alpha)
        return _scaled_later(begun, tensor, factor) if isinstance(begun, Generator) else _scaled(begun, tensor, factor)

    def passes(parameters: dict[str, Any]) -> tuple[int, int]:
        whole, each = method.passes(parameters)
        return whole, each if lines.alpha is not None else 2 * each + 1

    return replace(
        method, title=f"{method.title} with LiNeS", merge=merge, survey=survey, passes=passes, parts=None,
        running=None, base="required", needs_layers=True,
        low_rank=method.low_rank if lines.alpha is not None else lambda tensor: False,
    )  # fmt: skip


def _scaled(output: Output, tensor: Tensor, factor: float) -> Output:
    """Scaled by 1 it is the output itself, to the bit."""
    return output if factor == 1 else then(scaled, output, lines_base=tensor.base, lines_factor=factor)


def _scaled_later(steps: Steps, tensor: Tensor, factor: float) -> Steps:
    output = yield from steps
    return _scaled(output, tensor, factor)


def _alpha(method: Method, tensors: list[Tensor], norm: str) -> Steps:
    """(|sum_i tau_i| / |tau_M|) / n; 1 / n where the merged vector is zero."""
    rule = lengths if norm == "l1" else squares
    measured = []
    for tensor in tensors:
        begun = method.merge(tensor)
        output = (yield from begun) if isinstance(begun, Generator) else begun
        measured.append(then(rule, output, lines_base=tensor.base, lines_models=tensor.models))
    answers = yield tuple(_sums(measured, method))
    merged, plain = (sum(answer[k] for answer in answers) for k in (0, 1))
    ratio = plain / merged if merged else 1.0
    return (ratio if norm == "l1" else sqrt(ratio)) / tensors[0].size


def _sums(measured: list[Output], method: Method) -> Iterator[Request]:
    """The requests that add up what is measured."""
    calls = tuple(output for output in measured if isinstance(output, Call))
    if calls:
        yield Totals(calls)
    for output in measured:
        if isinstance(output, Whole) and not output.by_rows:
            raise UsageError(f"lines: the norm of what {method.name} merges is not known beforehand: give alpha")
        if isinstance(output, Whole):
            yield Rows(_added(output.function), output.arguments, total=True)


def _added(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **arguments: np.array([part.sum(dtype=np.float64) for part in function(**arguments)])


# --- one model ------------------------------------------------------------------------------------------


def merge(tensor: Tensor) -> Output:
    alpha, beta = tensor["alpha"], tensor["beta"]
    lines = Lines(alpha, 1 - alpha if beta is None else beta, outside=tensor["outside"])
    factor = lines.factor(tensor, alpha)
    return call(scaled, merged=tensor.models[0], lines_base=tensor.base, lines_factor=factor)


_OUTSIDE = Parameter(
    "outside", "str", "alpha", "the factor outside of the layers: alpha, or one", choices=("alpha", "one"),
    mergekit=False,
)  # fmt: skip

ONE_MODEL = Method(
    name="lines",
    title="LiNeS",
    summary="scale one task vector more the deeper its layer",
    advice="When a fine-tune has lost what the base could do: alpha 0.1 to 0.5. After a merge: the section lines.",
    citation=Citation(
        "LiNeS: post-training layer scaling prevents forgetting and enhances model merging", "Wang et al.",
        "ICLR 2025", "https://arxiv.org/abs/2410.17146",
    ),
    merge=merge,
    max_models=1,
    needs_layers=True,
    parameters=(
        Parameter("alpha", "float", 0.1, "factor of the first layer", low=0, mergekit=False),
        Parameter("beta", "float", None, "how much the factor grows up to the last layer; by default 1 - alpha",
                  mergekit=False),
        _OUTSIDE,
        EXCLUDE,
    ),
)  # fmt: skip

#: What the section ``lines`` takes.
AFTER_A_METHOD = replace(
    ONE_MODEL,
    max_models=None,
    parameters=(
        Parameter("alpha", "float", None, "factor of the first layer; by default from the norms", low=0),
        Parameter("beta", "float", REQUIRED, "how much the factor grows up to the last layer"),
        Parameter("norm", "str", "l1", "the norm that the default of alpha compares", choices=("l1", "l2")),
        _OUTSIDE,
    ),
)

METHODS = (ONE_MODEL,)

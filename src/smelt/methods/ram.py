"""RAM: add what one model alone has learnt in full, average what several have.

Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models", 2026, https://arxiv.org/abs/2601.13572, as
mergekit has it. A task vector's element is active where |theta_i - theta_0| > ``epsilon``; c is the number of models
in which it is:

    theta = theta_0 + the mean of the active elements

``ramplus_tl`` makes up for the dilution of what is shared: what is unique to model i (c = 1) is multiplied by
1 + r min(rho_i, alpha), rho_i = (its shared elements) / max(its unique elements, epsilon), per tensor.
"""

from __future__ import annotations

from typing import Any

from ..kernels.program import Call, Copy, Totals, call
from ..kernels.vocabulary import where
from .registry import Citation, Method, Parameter, Steps
from .tensors import Tensor


def active_in(base: Any, models: Any, epsilon: Any) -> Any:
    """In how many models an element is active."""
    count = 0
    for model in models:
        count += where(abs(model - base) > epsilon, 1, 0)
    return count


def add_active(base: Any, models: Any, factors: Any, epsilon: Any) -> Any:
    """The mean of what is active; what is unique times its model's factor."""
    count = active_in(base, models, epsilon)
    total = 0
    for model, factor in zip(models, factors):  # noqa: B905
        tau = model - base
        value = where(count == 1, factor * tau, tau)
        total += where(abs(tau) > epsilon, value, 0)
    return base + total / where(count > 1, count, 1)


def unique_and_shared(base: Any, model: Any, models: Any, epsilon: Any) -> Any:
    count = where(abs(model - base) > epsilon, active_in(base, models, epsilon), 0)
    return (where(count == 1, 1, 0), where(count > 1, 1, 0))


def merge(tensor: Tensor) -> Call | Copy:
    return _added(tensor, (1.0,) * len(tensor.models))


def merge_plus(tensor: Tensor) -> Steps:
    given = {"base": tensor.base, "models": tensor.models, "epsilon": tensor["epsilon"]}
    counts = yield tuple(Totals((call(unique_and_shared, model=model, **given),)) for model in tensor.models)
    return _added(tensor, tuple(1 + tensor["r"] * _overlap(tensor, *count) for count in counts))


def _overlap(tensor: Tensor, unique: float, shared: float) -> float:
    ratio = shared / max(unique, tensor["epsilon"]) if unique else 0.0
    return float(min(ratio, tensor["alpha"]))


def _added(tensor: Tensor, factors: tuple[float, ...]) -> Call | Copy:
    if not tensor.models:
        return Copy(tensor.base)  # type: ignore[arg-type]
    return call(add_active, base=tensor.base, models=tensor.models, factors=factors, epsilon=tensor["epsilon"])


CITATION = Citation(
    "Behavior Knowledge Merge in Reinforced Agentic Models", "Yuan et al.", "2026", "https://arxiv.org/abs/2601.13572"
)
_EPSILON = Parameter("epsilon", "float", 1e-5, "the largest difference that counts as none", low=0)

METHODS = (
    Method(
        name="ram",
        title="RAM, Reinforced Agent Merging",
        summary="add what is unique to one model, average what several share",
        advice="For agents trained by reinforcement, whose task vectors are sparse and overlap little.",
        citation=CITATION,
        merge=merge,
        min_models=0,
        parameters=(_EPSILON,),
    ),
    Method(
        name="ramplus_tl",
        title="RAM+, scaled tensor by tensor",
        summary="as ram, with unique parts strengthened by their overlap",
        advice="As ram, where averaging what is shared weakens the models.",
        citation=CITATION,
        merge=merge_plus,
        passes=lambda parameters: (0, 1),
        min_models=0,
        parameters=(
            Parameter("r", "float", 0.1, "how much the overlap strengthens unique elements"),
            Parameter("alpha", "float", 0.2, "the overlap counts up to this", low=0),
            _EPSILON,
        ),
    ),
)

"""Results that are more than one model: a vector that all tasks share, and what makes each task's model of it.

    theta_i = theta_0 + rescale_i * mask_i * unified

A method of this kind gives its unified model, with ``task`` the model of one task, and through ``parts`` all
that is needed to make any of them from the base again: ``unified``, and ``mask.<i>`` (one bit per element) and
``rescale.<i>`` (a number) for each task. :func:`restored` is the formula that puts them together.
"""

from __future__ import annotations

from typing import Any

from ..errors import UsageError
from ..kernels.vocabulary import where
from .registry import Parameter
from .tensors import Model, Tensor

#: The value of ``task`` while all parts are made.
EVERY = -1

TASK = Parameter(
    "task", "int", None, "make the model of this task (0 is the first model) instead of the unified one",
    low=0, mergekit=False,
)  # fmt: skip

#: For ``Parameter.when``: has an effect only where a task is chosen.
FOR_A_TASK: tuple[str, tuple[str, ...]] = ("task", ())


def task_of(view: Tensor | Model) -> int | None:
    """The index of the task whose model is wanted, or None. UsageError when there is no such model."""
    task, models = view["task"], view.size
    if task is None or task == EVERY:
        return None
    if task >= models:
        raise UsageError(f"task {task}: there are {models} models, counted from 0")
    return int(task)


def restored(base: Any, vector: Any, keep: Any, scale: Any) -> Any:
    """An element of one task's model."""
    return base + where(keep, scale * vector, 0)

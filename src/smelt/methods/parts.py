"""Results that are more than one model: what is stored of them, and what makes each task's model of it.

A method of this kind gives its unified model, with ``task`` the model of one task, and through ``parts`` all that
is needed to make each of the tasks' models from the base again. There are two kinds.

1. A vector that all tasks share, ``unified``, with ``mask.<i>`` (one bit per element) and ``rescale.<i>`` (a number)
   for each task: theta_i = theta_0 + rescale_i * mask_i * unified.
2. Each task's own vector in little space: ``factors.<i>``, whose row j is u_j, s_j, v_j one after the other, the
   largest s first (fewer rows are a coarser vector), or ``delta.<i>``, the vector itself:
   theta_i = theta_0 + sum_j s_j u_j v_j^T, or theta_0 + delta_i.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..kernels.vocabulary import where
from .registry import EVERY, Parameter
from .spectral import Matrix, Triplets
from .tensors import Model, Tensor

TASK = Parameter(
    "task", "int", None, "make the model of this task (0 is the first model) instead of the unified one",
    low=0, mergekit=False,
)  # fmt: skip

#: For ``Parameter.when``: has an effect only where a task is chosen.
FOR_A_TASK: tuple[str, tuple[str, ...]] = ("task", ())

#: For ``Parameter.when``: has an effect only on the unified model.
FOR_NO_TASK: tuple[str, tuple[Any, ...]] = ("task", (None,))


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


def packed(found: Triplets, rows: int) -> Matrix:
    """The triplets of a matrix (m, n) as (rows, m + 1 + n); rows of 0 where there are fewer of them."""
    filled = np.concatenate([found.left.T, found.sigma[:, None], found.right.T], axis=1)
    return np.concatenate([filled, np.zeros((rows - found.rank, filled.shape[1]))])


def expanded(base: npt.NDArray[Any], factors: npt.NDArray[Any]) -> Matrix:
    """The model (m, n) of a task whose vector is in factors (k, m + 1 + n), in fp64."""
    left, sigma, right = np.split(factors.astype(np.float64), [len(base), len(base) + 1], axis=1)
    return np.asarray(base + (left * sigma).T @ right)


def added(base: Any, vector: Any) -> Any:
    """An element of the model of a task whose vector is stored."""
    return base + vector

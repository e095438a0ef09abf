"""Reading tensors for good: whole, and finite."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from ..engine.artefact import Work
from ..engine.device import nonfinite
from ..engine.inputs import Input
from ..engine.whole import read_whole
from ..errors import OperationFailed, show


def finite_values(work: Work, item: Input, name: str) -> npt.NDArray[Any]:
    """One of the inputs' tensors, as values. OperationFailed where it holds NaN or Inf."""
    values = read_whole(work.operand(item, name))
    if nonfinite(values, item.checkpoint.tensors[name].dtype).any():
        raise OperationFailed(f"{item.label}: tensor {show(name)} holds NaN or Inf")
    return values

"""A formula on whole arrays: numpy, or torch on any device and under autograd.

This is the definition that the compiled kernels must match bit for bit, and what runs on a GPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from . import vocabulary
from .source import Formula, source_of


def apply(formula: Formula, arguments: dict[str, Any]) -> Any:
    """Run ``formula`` on arrays of one computing dtype (float32 or float64).

    Values of ``arguments``: an array, a tuple of arrays, a Python float, or a tuple of floats. Floats are
    rounded to the computing dtype, as the compiled kernel does.
    """
    sample = _first_array(arguments)
    if type(sample).__module__.partition(".")[0] == "torch":
        return _torch_function(formula, str(sample.device), sample.dtype)(
            **{name: _torch_value(value, sample) for name, value in arguments.items()}
        )
    import numpy as np

    with np.errstate(all="ignore"):
        return _numpy_function(formula, sample.dtype)(
            **{name: _numpy_value(value, sample.dtype.type) for name, value in arguments.items()}
        )


def _first_array(arguments: dict[str, Any]) -> Any:
    """An array that sets backend, device and computing dtype: the first floating one."""
    for value in arguments.values():
        for item in value if isinstance(value, tuple) else (value,):
            if hasattr(item, "dtype") and getattr(item, "ndim", None) and "float" in str(item.dtype):
                return item
    raise TypeError("an element formula needs at least one floating array")


@cache
def _numpy_function(formula: Formula, dtype: Any) -> Formula:
    return _specialise(formula, dtype.type)


@cache
def _torch_function(formula: Formula, device: str, dtype: Any) -> Formula:
    import torch

    return _specialise(formula, lambda value: torch.tensor(value, dtype=dtype, device=device))


def _specialise(formula: Formula, pin: Any) -> Formula:
    """The pinned source of ``formula`` with its constants made by ``pin``."""
    source = source_of(formula)
    namespace: dict[str, Any] = dict(vocabulary.WORDS)
    namespace.update({name: pin(value) for name, value in source.constants.items()})
    exec(compile(source.text, f"<formula {source.name}>", "exec"), namespace)
    return namespace[source.name]  # type: ignore[no-any-return]


def _numpy_value(value: Any, pin: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_numpy_value(item, pin) for item in value)
    if isinstance(value, bool):
        return value
    return pin(value) if isinstance(value, int | float) else value


def _torch_value(value: Any, sample: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_torch_value(item, sample) for item in value)
    if isinstance(value, bool):
        return value
    return sample.new_tensor(value) if isinstance(value, int | float) else value

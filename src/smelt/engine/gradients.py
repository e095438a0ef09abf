"""Merging under torch's autograd: gradients flow through the element formula, to weights and parameters.

What a method knows of a tensor beforehand (norms, thresholds, random draws) is computed as ever, from the
values, and counts as constant. The formula itself then runs on the live tensors.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np

from ..errors import OperationFailed, UsageError, show
from ..kernels.arrays import apply
from ..kernels.dtypes import DTYPES
from ..kernels.generate import precision_of
from ..kernels.program import Call, Copy, Draw, Mask, Operand, Output, Request, Step
from ..kernels.random import words
from .device import Policy
from .execute import Executor
from .jobs import Steps
from .quota import Quotas
from .tiles import BufferPool, Tile
from .whole import read_whole

#: Gives the live tensor of an operand, or None for one that was made on the way.
Live = Callable[[Any], Any]


class Traced:
    """A parameter's value that remembers the torch scalar it comes from.

    Methods compute with it as with a float. What would lose the gradient (``float()``, ``math.exp``) is an error.
    """

    __array_ufunc__ = None  # numpy's numbers leave arithmetic to this class
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, names: frozenset[str], value: float, tensor: Any) -> None:
        self.names, self.value, self.tensor = names, value, tensor

    def _with(self, other: Any, function: Callable[[Any, Any], Any], swapped: bool = False) -> Traced:
        value, tensor = (other.value, other.tensor) if isinstance(other, Traced) else (float(other),) * 2
        names = self.names | (other.names if isinstance(other, Traced) else frozenset())
        pairs = ((self.value, value), (self.tensor, tensor))
        a, b = (function(y, x) if swapped else function(x, y) for x, y in pairs)
        return Traced(names, a, b)

    def __add__(self, other: Any) -> Traced:
        return self._with(other, operator.add)

    def __radd__(self, other: Any) -> Traced:
        return self._with(other, operator.add, swapped=True)

    def __sub__(self, other: Any) -> Traced:
        return self._with(other, operator.sub)

    def __rsub__(self, other: Any) -> Traced:
        return self._with(other, operator.sub, swapped=True)

    def __mul__(self, other: Any) -> Traced:
        return self._with(other, operator.mul)

    def __rmul__(self, other: Any) -> Traced:
        return self._with(other, operator.mul, swapped=True)

    def __truediv__(self, other: Any) -> Traced:
        return self._with(other, operator.truediv)

    def __rtruediv__(self, other: Any) -> Traced:
        return self._with(other, operator.truediv, swapped=True)

    def __neg__(self) -> Traced:
        return self * -1.0

    def __abs__(self) -> Traced:
        return -self if self.value < 0 else self

    def sin(self) -> Traced:
        return Traced(self.names, math.sin(self.value), self.tensor.sin())

    def __lt__(self, other: Any) -> bool:
        return bool(self.value < plain(other))

    def __le__(self, other: Any) -> bool:
        return bool(self.value <= plain(other))

    def __gt__(self, other: Any) -> bool:
        return bool(self.value > plain(other))

    def __ge__(self, other: Any) -> bool:
        return bool(self.value >= plain(other))

    def __eq__(self, other: object) -> bool:
        return bool(self.value == plain(other))

    def __bool__(self) -> bool:
        return bool(self.value)

    def __float__(self) -> float:
        raise UsageError(lost(self.names))

    __int__ = __index__ = __float__

    def bound(self) -> Any:
        """The torch scalar, with exactly the value that a merge without gradients uses."""
        return self.tensor + (self.value - self.tensor).detach()


def lost(names: Iterable[str]) -> str:
    return f"no gradient flows to {', '.join(sorted(names))} here: pass it as a number, not as a tensor"


def numbers(given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with torch scalars as plain numbers."""

    def one(value: Any) -> Any:
        return value.item() if hasattr(value, "requires_grad") else value

    return {name: list(map(one, value)) if isinstance(value, list) else one(value) for name, value in given.items()}


def remembering(resolved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The checked values, those that were given as torch scalars remembering where they come from."""

    def one(name: str, value: Any, source: Any) -> Any:
        return Traced(frozenset((name,)), float(value), source.double()) if hasattr(source, "requires_grad") else value

    def live(name: str, value: Any) -> Any:
        source = given.get(name)
        if not isinstance(value, tuple):
            return one(name, value, source)
        sources = source if isinstance(source, list | tuple) else (source,) * len(value)
        return tuple(one(name, *pair) for pair in zip(value, sources, strict=True))

    return {name: live(name, value) for name, value in resolved.items()}


def plain(value: Any) -> Any:
    """A value, or a tuple or mapping of them, without gradients."""
    if isinstance(value, tuple | list):
        return type(value)(map(plain, value))
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Step):
        return Step(plain(value.before), plain(value.after), value.cut)
    return value.value if isinstance(value, Traced) else value


def merge_live(
    begin: Callable[[], Steps | Output], like: Operand, executor: Executor, live: Live, dtype: str, policy: Policy
) -> tuple[Any, frozenset[str]]:
    """The output tensor as a function of the live ones, and the parameters that gradients flow to.

    ``begin`` starts the tensor's method, ``like`` has its shape.
    """
    import torch

    begun = begin()
    output: Output = executor.survey(_with_constants(begun)) if isinstance(begun, Generator) else begun
    if not isinstance(output, Call | Copy):
        raise UsageError("differentiable: this method works on whole matrices, which no gradient flows through")
    if isinstance(output, Call):
        output = Quotas().resolved(output, Tile(0, output.count, BufferPool()))
    result = _tensor(output.operand, live) if isinstance(output, Copy) else _applied(output, live)
    merged = result.reshape(like.shape).to(getattr(torch, DTYPES[dtype].value_type))
    if policy != "allow" and not merged.isfinite().all():
        raise OperationFailed(f"tensor {show(getattr(like, 'name', ''))}: an input or the result holds NaN or Inf")
    return merged, remembered(output.items() if isinstance(output, Call) else ())


def remembered(values: Iterable[Any]) -> frozenset[str]:
    """The names of the parameters that any of ``values`` (tuples and steps looked into) remembers."""
    found: set[str] = set()
    for value in values:
        if isinstance(value, tuple):
            found |= remembered(value)
        elif isinstance(value, Step):
            found |= remembered((value.before, value.after))
        elif isinstance(value, Traced):
            found |= value.names
    return frozenset(found)


def _with_constants(steps: Generator[tuple[Request, ...], list[Any], Any]) -> Generator[Any, Any, Any]:
    """The same coroutine, whose requests are made of values alone."""
    results: Any = None
    while True:
        try:
            requests = steps.send(results)
        except StopIteration as end:
            return end.value
        results = yield tuple(_constant(request) for request in requests)


def _constant(request: Request) -> Request:
    """The request without gradients, in its formula's arguments and elsewhere."""
    values = {each.name: plain(getattr(request, each.name)) for each in fields(request)}
    if "calls" in values:
        values["calls"] = tuple(Call(call.formula, plain(call.arguments)) for call in values["calls"])
    return replace(request, **values)


def _applied(call: Call, live: Live) -> Any:
    """The formula on whole tensors."""
    import torch

    constant = Call(call.formula, plain(call.arguments))
    dtype = getattr(torch, precision_of(constant))
    device = next((found.device for operand in constant.operands() if (found := live(operand)) is not None), "cpu")
    count = constant.count

    def bound(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(bound, value))
        if isinstance(value, Traced):
            return value.bound().to(device, dtype)
        if isinstance(value, Step):
            before, after = (torch.as_tensor(bound(x), dtype=dtype, device=device) for x in (value.before, value.after))
            return torch.where(torch.arange(count, device=device) < value.cut, before, after)
        if isinstance(value, Draw):
            return words(value.key, 0, count, torch.empty(0, device=device)) >= value.threshold
        if isinstance(value, Mask):
            return torch.from_numpy(read_whole(value.operand).reshape(-1) != 0).to(device)
        return _tensor(value, live).reshape(-1).to(device, dtype) if hasattr(value, "read") else value

    return apply(call.formula, {name: bound(value) for name, value in call.arguments.items()})


def _tensor(operand: Any, live: Live) -> Any:
    """The operand as a torch tensor: the caller's own, or a copy of what was made on the way."""
    import torch

    found = live(operand)
    if found is not None:
        return found
    values = np.ascontiguousarray(read_whole(operand))
    stored = values.view(DTYPES[operand.dtype].storage)
    return torch.from_numpy(stored).view(getattr(torch, DTYPES[operand.dtype].value_type))

"""A fine-tune and its base side by side: which modules there are, and how they differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.artefact import Work
from ..errors import InputRejected, show
from .lowrank import Difference, Shape, subtracted
from .modules import Module, modules_of
from .values import finite_values

Array = npt.NDArray[Any]

_STRETCH = 1 << 20


class Pair:
    """The base and the model of ``work.inputs``. InputRejected with all that keeps them from being compared."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.base, self.model = work.inputs
        InputRejected.gather(self._problems())
        self.modules = modules_of(self.model.checkpoint)

    def _problems(self) -> Iterator[str]:
        base, model = self.base, self.model
        for name, info in model.checkpoint.tensors.items():
            twin = self._twin(name)
            if twin is None:
                yield f"{base.label}: tensor {show(name)} of {model.label} is missing: is this the base of it?"
            elif self._is_resized(name) and model.structure.vocabulary_axis(name) is None:
                shape = list(base.checkpoint.tensors[twin].shape)
                yield f"tensor {show(name)} is {list(info.shape)} in {model.label} and {shape} in {base.label}"
        for name in base.checkpoint.tensors:
            if name not in model.checkpoint.tensors:
                yield f"{model.label}: tensor {show(name)} of {base.label} is missing: is this a fine-tune of it?"

    def _twin(self, name: str) -> str | None:
        """The base's tensor beside one of the model's: of the same name, or the embedding that the base ties it to."""
        return name if name in self.base.checkpoint.tensors else self.base.structure.tied_source(name)

    def _is_resized(self, name: str) -> bool:
        twin = self.base.checkpoint.tensors[str(self._twin(name))]
        return self.model.checkpoint.tensors[name].shape != twin.shape

    def resized(self, module: Module) -> bool:
        return any(map(self._is_resized, module.tensors.values()))

    def shape(self, module: Module) -> Shape:
        """Of a module's weight as a matrix: what follows the first axis is one."""
        first, *rest = self.model.checkpoint.tensors[module.tensors["weight"]].shape
        return first, prod(rest)

    def nbytes(self, module: Module) -> int:
        return sum(self.model.checkpoint.tensors[name].nbytes for name in module.tensors.values())

    def reads(self, names: Iterable[str]) -> int:
        """Bytes of these tensors and of the base's beside them."""
        model, base = self.model.checkpoint.tensors, self.base.checkpoint.tensors
        return sum(model[name].nbytes + base[str(self._twin(name))].nbytes for name in names)

    def difference(self, module: Module) -> Difference:
        """Of the weights as matrices."""
        return Difference(*(values.reshape(self.shape(module)) for values in self._read(module.tensors["weight"])))

    def array(self, module: Module) -> npt.NDArray[np.float64]:
        """``model - base`` of the weight, with all its axes."""
        return subtracted(*self._read(module.tensors["weight"]))

    def offset(self, name: str) -> npt.NDArray[np.float64]:
        """``model - base`` of a small tensor."""
        return subtracted(*self._read(name))

    def norm(self, module: Module) -> float:
        """Frobenius norm of the difference of all its tensors; NaN where the shapes differ."""
        if self.resized(module):
            return float("nan")
        return sqrt(sum(self._square(name) for name in module.tensors.values()))

    def _square(self, name: str) -> float:
        """The squared norm of one tensor's difference, a stretch at a time."""
        model, base = (values.reshape(-1) for values in self._read(name))
        parts = (slice(start, start + _STRETCH) for start in range(0, len(model), _STRETCH))
        return sum(float((subtracted(model[part], base[part]) ** 2).sum()) for part in parts)

    def _read(self, name: str) -> tuple[Array, Array]:
        return finite_values(self._work, self.model, name), finite_values(self._work, self.base, str(self._twin(name)))

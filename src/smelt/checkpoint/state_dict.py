"""The tensors of a pickled state dict, as weight files offer theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import storage
from ..errors import InputRejected, show
from .base import TensorInfo
from .pickles import Inert
from .safetensors import MAX_TENSORS, Header, name_problem
from .stored import Stored
from .torch_file import StoredTensor, TorchFile

#: Keys under which trainers keep the state dict, beside what else they save.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")

#: Tied tensors are stored once and read under each name; more than that is no model.
_MOST_SHARED = 64

_MOST_NAMED = 6


class PickledFile:
    """One open file of ``torch.save``, with the attributes of a safetensors file. Raises InputRejected."""

    def __init__(self, stored: Stored) -> None:
        self._file = TorchFile(stored)
        self.identity, home = stored.identity, stored.identity.path.name
        try:
            found, notices = _state_dict(self._file.content, stored.name, home)
            self._tensors = _checked(found, stored.name, self.identity.size)
        except BaseException:
            self.close()
            raise
        infos = {name: TensorInfo(name, t.dtype, t.shape, home, t.offset) for name, t in self._tensors.items()}
        self.header = Header(infos, {}, notices)

    def read(self, info: TensorInfo, start: int, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` (1-D, of the storage type) from its ``start``-th element on. Thread-safe."""
        if start < 0 or start + len(out) > info.count:
            raise ValueError(f"elements {start} to {start + len(out)} of {info} are outside of the tensor")
        self._tensors[info.name].read(start, out)

    def read_runs(self, info: TensorInfo, starts: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        """Fill the rows of ``out`` (2-D), each from its own element on. Thread-safe."""
        for start, row in zip(starts.tolist(), out, strict=True):
            self.read(info, start, row)

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def close(self) -> None:
        self._file.close()


def _state_dict(content: Any, where: str, home: str) -> tuple[Mapping[Any, Any], tuple[str, ...]]:
    """The dictionary of tensors, and what there is to tell of it."""
    if not isinstance(content, Mapping):
        raise InputRejected(
            f"{storage.shown(where)} holds {_kind(content)}, expected a dictionary of tensors: save the model's "
            "state_dict()"
        )
    wrappers = [key for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
    if not wrappers:
        return content, ()
    if len(wrappers) > 1:
        raise InputRejected(f"{storage.shown(where)} holds several state dicts: {', '.join(map(show, wrappers))}")
    beside = [show(key) for key in content if key != wrappers[0]]
    more = f" and {len(beside) - _MOST_NAMED} more" if len(beside) > _MOST_NAMED else ""
    left = f"; left aside: {', '.join(beside[:_MOST_NAMED])}{more}" if beside else ""
    return content[wrappers[0]], (f"{show(home)}: the tensors under {show(wrappers[0])} are read{left}",)


def _checked(found: Mapping[Any, Any], name: str, size: int) -> dict[str, StoredTensor]:
    """The same, once every value is a tensor with a usable name."""
    where = storage.shown(name)
    problems = list(_problems(found))
    rest = len(problems) - _MOST_NAMED
    more = [f"{where}: and {rest} more problems of this kind"] if rest > 0 else []
    InputRejected.gather([*(f"{where}: {problem}" for problem in problems[:_MOST_NAMED]), *more])
    if not found or len(found) > MAX_TENSORS:
        raise InputRejected(f"{where} holds {len(found)} tensors, expected 1 to {MAX_TENSORS}")
    tensors = dict(sorted(found.items()))
    total = sum(TensorInfo("", tensor.dtype, tensor.shape).nbytes for tensor in tensors.values())
    if total > _MOST_SHARED * size:
        raise InputRejected(f"{where}: tensors of {total} bytes share the {size} bytes of the file")
    return tensors


def _problems(found: Mapping[Any, Any]) -> Iterator[str]:
    for name, value in found.items():
        if not isinstance(name, str):
            yield f"the key {show(name)} is no text, expected the name of a tensor"
        elif problem := name_problem(name):
            yield f"tensor {show(name)} has a bad name: it {problem}"
        elif not isinstance(value, StoredTensor):
            yield f"{show(name)} is {_kind(value)}, expected a tensor"


def _kind(value: Any) -> str:
    """What it is, in a word."""
    if isinstance(value, Inert):
        return f"an object of {show(value.name)}"
    return "a tensor" if isinstance(value, StoredTensor) else f"a {type(value).__name__}"

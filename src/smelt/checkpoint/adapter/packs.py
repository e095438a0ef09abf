"""Delta packs: what a fine-tune added, tensor by tensor, in fewer bits.

A pack is a folder as an adapter's, with ``peft_type: SMELT_DELTA``. Of each tensor of the base that changes it holds
``<tensor>::index`` (uint32) and ``<tensor>::value``, or ``<tensor>::sign`` (uint8, eight elements each) and
``<tensor>::scale``, or ``<tensor>::delta``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ...errors import InputRejected, show
from ..base import Checkpoint, TensorInfo
from .updates import Dense, Entries, Packed, Signs

KIND = "SMELT_DELTA"
PART = re.compile(r"(.+)::(index|value|sign|scale|delta)")


def packed(file: Checkpoint, tensors: Mapping[str, Mapping[str, TensorInfo]]) -> Iterator[Packed]:
    """The update of each tensor, by its name and its parts'. InputRejected for parts that do not belong together."""
    problems: list[str] = []
    for name, parts in sorted(tensors.items()):
        problem = _problem(parts)
        if problem:
            problems.append(f"{file.label}: {show(name)} {problem}")
            continue
        module, _, parameter = name.rpartition(".")
        if "index" in parts:
            yield Entries(module, parameter, parts["index"], parts["value"])
        elif "sign" in parts:
            yield Signs(module, parameter, parts["sign"], parts["scale"])
        else:
            yield Dense(module, parameter, parts["delta"])
    InputRejected.gather(problems)


def _problem(parts: Mapping[str, TensorInfo]) -> str | None:
    """What is wrong with the parts of one tensor."""
    if set(parts) == {"index", "value"}:
        index, value = parts["index"], parts["value"]
        fits = index.dtype == "U32" and len(index.shape) == 1 and index.shape == value.shape
        return None if fits else f"has an index {index.dtype} {list(index.shape)} beside values {list(value.shape)}"
    if set(parts) == {"sign", "scale"}:
        sign, scale = parts["sign"], parts["scale"]
        fits = sign.dtype == "U8" and len(sign.shape) == 1 and scale.count == 1
        return None if fits else f"has signs {sign.dtype} {list(sign.shape)}, {scale.count} scales: expected U8, one"
    return None if set(parts) == {"delta"} else f"has {', '.join(sorted(parts))}, expected index and value or the like"

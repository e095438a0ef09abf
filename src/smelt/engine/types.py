"""Which dtype a merge of several dtypes is written in."""

from __future__ import annotations

from collections.abc import Iterable


def common_dtype(codes: Iterable[str]) -> str:
    """The smallest type that holds all: equal types stay, bfloat16 with float16 gives float32."""
    distinct = set(codes)
    if len(distinct) == 1:
        return distinct.pop()
    return "F64" if "F64" in distinct else "F32"

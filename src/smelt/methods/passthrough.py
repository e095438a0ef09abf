"""Take one model's tensors as they are, or scaled: layer stacking ("frankenmerging"), pruning, expansion.

No paper describes the practice itself; Kim et al., "SOLAR 10.7B: scaling large language models with simple
yet effective depth up-scaling", NAACL 2024, https://arxiv.org/abs/2312.15166, and Wu et al., "LLaMA Pro",
ACL 2024, https://arxiv.org/abs/2401.02415 (copied layers with their output projections scaled to zero) use it.
"""

from __future__ import annotations

from typing import Any

from ..kernels.program import Call, Copy, call
from .registry import Citation, Method, Parameter
from .tensors import Tensor


def scaled(x: Any, scale: Any) -> Any:
    return scale * x


def merge(tensor: Tensor) -> Call | Copy:
    (scale,) = tensor.each["scale"]
    if scale == 1.0:
        return Copy(tensor.models[0])
    return call(scaled, x=tensor.models[0], scale=scale)


METHODS = (
    Method(
        name="passthrough",
        title="Passthrough, layer stacking",
        summary="one model's tensors, copied or scaled",
        advice="With slices: repeat, reorder or drop layers. Expect to train afterwards.",
        citation=Citation(
            "SOLAR 10.7B: scaling large language models with simple yet effective depth up-scaling",
            "Kim et al.",
            "NAACL 2024",
            "https://arxiv.org/abs/2312.15166",
        ),
        merge=merge,
        base="ignored",
        max_models=1,
        parameters=(Parameter("scale", "float", 1.0, "factor of each tensor", per_model=True),),
    ),
)

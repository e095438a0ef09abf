"""NearSwap: move the base towards a second model, where the two are near each other.

The algorithm of alchemonaut's QuartetAnemoi, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001, as
mergekit has it. With a the base and b the model:

    theta = w b + (1 - w) a,    w = min(t / max(|a - b|, 1e-6), 1)

so an element moves by at most t, and all the way where it is no further away.
"""

from __future__ import annotations

from typing import Any

from ..kernels.program import Call, call
from ..kernels.vocabulary import maximum, minimum
from .registry import REQUIRED, Citation, Method, Parameter
from .tensors import Tensor


def near(base: Any, model: Any, t: Any) -> Any:
    weight = minimum(t / maximum(abs(base - model), 1e-6), 1)
    return weight * model + (1 - weight) * base


def merge(tensor: Tensor) -> Call:
    return call(near, base=tensor.base, model=tensor.models[0], t=tensor["t"])


METHODS = (
    Method(
        name="nearswap",
        title="NearSwap",
        summary="take from a second model what is near the base",
        advice="To colour a model with another without losing its own: t about a typical difference, 1e-4 or less.",
        citation=Citation(
            "QuartetAnemoi-70B-t0.0001", "alchemonaut", "Hugging Face, 2024",
            "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        ),
        merge=merge,
        max_models=1,
        parameters=(Parameter("t", "float", REQUIRED, "how far an element may move", low=0),),
    ),
)  # fmt: skip

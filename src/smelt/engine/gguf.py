"""A merge that is written as one GGUF file: its layout, and the dtypes in which its tensors are brought."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..checkpoint.gguf import GgufLayout, described, is_buffer, plan_gguf
from ..errors import InputRejected, UsageError, show
from ..kernels.dtypes import DTYPES
from .config import patched_configs
from .outputs import Output

if TYPE_CHECKING:
    from .planning import Plan

FILE = "model.gguf"


def gguf_layout(plan: Plan) -> GgufLayout:
    """Where everything will lie. UsageError or InputRejected when the result cannot be written as GGUF."""
    if plan.options.raw:
        raise UsageError("the output format gguf needs a config, which raw leaves out: merge without raw")
    outputs = [output for output in plan.outputs if not is_buffer(output.name)]
    InputRejected.gather(
        f"tensor {show(output.name)} is {output.dtype}, which is not written to GGUF"
        for output in outputs
        if not DTYPES[output.dtype].arithmetic
    )
    config = json.loads(patched_configs(plan).get("config.json", b"{}"))
    donor = described(plan.inputs.donor.checkpoint, plan.recipe.name or "model")
    whole = replace(donor, config=config, files=plan.side_files())
    return plan_gguf(FILE, {output.name: output.shape for output in outputs}, whole, _dtype(plan, outputs))


def _dtype(plan: Plan, outputs: Sequence[Output]) -> str:
    """What the recipe says, else what most elements have; GGUF has no matrices of float64 that are computed with."""
    asked = plan.recipe.output.packing if plan.recipe.output is not None else None
    counts: dict[str, int] = {}
    for output in outputs:
        counts[output.dtype] = counts.get(output.dtype, 0) + output.count
    most = plan.recipe.written_dtype or max(sorted(counts), key=counts.__getitem__)
    return asked or ("F32" if most == "F64" else most)


def in_gguf(outputs: Sequence[Output], layout: GgufLayout) -> tuple[Output, ...]:
    """The outputs that the file holds, each in the dtype in which the writer wants it."""
    dtypes = {info.name: info.dtype for info in layout.tensors}
    return tuple(replace(output, dtype=dtypes[output.name]) for output in outputs if output.name in dtypes)

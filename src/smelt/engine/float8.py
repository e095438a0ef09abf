"""A merge whose linear layers are written in FP8: which tensors, with which scales, and what config.json says of it.

``fp8_block``: a scale for each 128 x 128 elements, ``<weight>_scale_inv``, as DeepSeek-V3 has them (quant_method
"fp8"). ``fp8_tensor``: one for each weight, ``<weight>_scale`` (compressed-tensors' "float-quantized"). Activations are
quantised by whoever runs the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..architecture import role_of
from ..checkpoint import TensorInfo
from ..checkpoint.adapter import is_transposed_layer
from ..checkpoint.adapter.adapted import AdaptedCheckpoint
from ..checkpoint.quantised import Dequantised, Window
from ..errors import UsageError, show
from ..kernels.dtypes import DTYPES
from .outputs import Output
from .tiles import TILE

if TYPE_CHECKING:
    from .planning import Plan

#: Rows and columns that share a scale.
BLOCK = 128

_LINEAR = ("attention.", "mlp.", "expert.", "shared_expert.")
_NO_LAYER = ("embedding", "norm", "position", "input", "buffer")
_TOWERS = re.compile(r"\b(vision|visual|audio)")

Scales = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Form:
    """A matrix in FP8: ``scale`` names its scales, one per ``height`` x ``width`` elements.

    ``given`` reads the scales to use, in the shape of the grid; None where they come from the values.
    """

    rows: int
    columns: int
    height: int
    width: int
    scale: str
    given: Callable[[], Scales] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.rows // self.height), -(-self.columns // self.width)

    @property
    def count(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Float8:
    """``forms``: by the names of the tensors that are written in FP8. ``kept``: other modules with matrices."""

    kind: str
    forms: Mapping[str, Form]
    kept: tuple[str, ...]

    def dtype(self, output: Output) -> str:
        """How a tensor is stored."""
        return "F8_E4M3" if output.name in self.forms else output.dtype

    def stored(self, output: Output) -> Iterator[TensorInfo]:
        """What a tensor is stored as: itself, or codes and scales."""
        form = self.forms.get(output.name)
        yield TensorInfo(output.name, self.dtype(output), output.shape)
        if form is not None:
            yield TensorInfo(form.scale, "F32", form.grid if self.kind == "FP8_BLOCK" else (1,))

    def memory(self, threads: int) -> int:
        """What waits for its scale: bands of rows, of which each thread works on one, and parts of one more."""
        if self.kind == "FP8_TENSOR":
            return 5 * threads * TILE
        return 5 * (threads + 1) * max((form.height * form.columns for form in self.forms.values()), default=0)

    def spooled(self, threads: int) -> int:
        """Disk space that values take until their tensor's scale is known."""
        counts = [form.count for form in self.forms.values() if self.kind == "FP8_TENSOR" and form.given is None]
        return 4 * sum(sorted(counts)[-2 * threads - 2 :])

    def config(self) -> dict[str, Any]:
        """``quantization_config``."""
        if self.kind == "FP8_BLOCK":
            return {
                "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK],
                "activation_scheme": "dynamic", "modules_to_not_convert": list(self.kept),
            }  # fmt: skip
        numbers = {"num_bits": 8, "type": "float", "symmetric": True}
        group = {
            "targets": ["Linear"], "format": "float-quantized",
            "weights": {**numbers, "strategy": "tensor", "dynamic": False},
            "input_activations": {**numbers, "strategy": "token", "dynamic": True},
        }  # fmt: skip
        return {
            "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": list(self.kept),
        }  # fmt: skip


def float8_layout(plan: Plan) -> Float8:
    """What is written in FP8. UsageError when nothing is, or the base has no such scales where they are asked for."""
    output = plan.recipe.output
    assert output is not None
    assert output.packing is not None
    donor, word = plan.inputs.donor.checkpoint, output.packing.lower()
    if plan.options.raw or not donor.config or len(donor.parts) > 1:
        raise UsageError(f"the output dtype {word} needs a model of one folder with its config.json")
    known = None if output.scales != "base" else _scales_of_base(plan)
    forms = {made.name: form for made in plan.outputs if (form := _form(made, output.packing, donor.config, known))}
    if not forms:
        raise UsageError(f"the output dtype {word}: no tensor is the weight of a linear layer in a block of the model")
    return Float8(output.packing, forms, tuple(_kept(plan.outputs, forms)))


def _form(output: Output, kind: str, config: Mapping[str, Any], known: _Known | None) -> Form | None:
    if not _is_linear(output, config):
        return None
    rows, columns = output.shape
    if kind == "FP8_BLOCK":
        plain = Form(rows, columns, BLOCK, BLOCK, f"{output.name}_scale_inv")
    else:
        plain = Form(rows, columns, rows, columns, f"{output.name}_scale")
    return plain if known is None else known(output, plain)


def _is_linear(output: Output, config: Mapping[str, Any]) -> bool:
    """The weight of a linear layer of the language model, but for head and routers, stored as (out, in)."""
    name = output.name
    if not name.endswith(".weight") or len(output.shape) != 2 or not output.count or _TOWERS.search(name):
        return False
    floating = DTYPES[output.dtype].arithmetic and role_of(name).startswith(_LINEAR)
    return floating and not is_transposed_layer(name.removesuffix(".weight"), config)


def _kept(outputs: tuple[Output, ...], forms: Mapping[str, Form]) -> Iterator[str]:
    """The modules whose matrices are no FP8, as the libraries that load the model want to know; the head always."""
    roles = {output.name: role_of(output.name) for output in outputs if output.name not in forms}
    if "head" not in roles.values():
        yield "lm_head"
    modules = [
        output.name.removesuffix(".weight") if output.name.endswith(".weight") else output.name.rpartition(".")[0]
        for output in outputs
        if len(output.shape) > 1 and output.name in roles and not roles[output.name].startswith(_NO_LAYER)
    ]
    yield from dict.fromkeys(modules)


# --- the base's scales ----------------------------------------------------------------------------------


class _Known:
    """The scales that the base has: only what is FP8 there becomes so."""

    def __init__(self, label: str, base: Dequantised) -> None:
        self._label, self._base = label, base

    def __call__(self, output: Output, plain: Form) -> Form | None:
        names = [source.name for source in output.piece.sources if source.input.label == self._label]
        matrix = self._base.float8(names[0]) if names else None
        if matrix is None:
            return None
        found, wanted = matrix.grid.shape(plain.rows, plain.columns), plain.grid
        if found != wanted:
            raise UsageError(
                f"output.scales: {self._label} has {found[0]} x {found[1]} scales for tensor {show(names[0])}, "
                f"expected {wanted[0]} x {wanted[1]}: choose the dtype that it has, or leave scales out"
            )
        return replace(plain, given=lambda: _usable(matrix.grid.scale(Window(0, 0, wanted[0], 0, wanted[1]))))


def _usable(scales: Scales) -> Scales:
    """A scale of 0 stands for zeros alone, whatever their codes."""
    return np.where(scales > 0, scales, np.float32(1))


def _scales_of_base(plan: Plan) -> _Known:
    base = plan.recipe.base_model
    item = plan.inputs.donor if base is None else plan.inputs[base]
    checkpoint = item.checkpoint
    while isinstance(checkpoint, AdaptedCheckpoint):
        checkpoint = checkpoint.base
    if not isinstance(checkpoint, Dequantised):
        raise UsageError(f"output.scales: {item.label} is not quantised: leave scales out")
    return _Known(item.label, checkpoint)

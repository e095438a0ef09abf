"""What a config and the names of tensors say of quantisation, without looking closer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..kernels.dtypes import DTYPES
from .base import Checkpoint
from .pipeline import PipelineCheckpoint

Settings = Mapping[str, Any]

#: Where config.json says how weights are quantised.
_KEYS = ("quantization_config", "compression_config")

#: What only means something beside codes.
COMPANIONS = (
    "_scale_inv", ".weight_scale", ".weight_scale_2", ".weight_packed", ".weight_shape", ".weight_zero_point",
    ".weight_g_idx", ".weight_global_scale", ".qweight", ".qzeros", ".scales", ".g_idx", ".absmax", ".quant_map",
    ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format", "_blocks", "_scales", ".pre_quant_scale",
)  # fmt: skip

#: Codes that are integers: without their config they would pass for indices or counts.
CODES = {".weight_packed": "compressed-tensors", ".qweight": "GPTQ or AWQ", ".SCB": "bitsandbytes"}


def is_quantised(checkpoint: Checkpoint) -> bool:
    """Whether anything is there of quantised weights; if not, all tensors are what they seem."""
    if isinstance(checkpoint, PipelineCheckpoint):
        return any(map(is_quantised, checkpoint.opened.values()))
    return bool(settings_of(checkpoint.config)) or any(
        name.endswith(_TELLING) or not (DTYPES[info.dtype].arithmetic or not DTYPES[info.dtype].floating)
        for name, info in checkpoint.tensors.items()
    )


_TELLING = (*COMPANIONS, *CODES)


def settings_of(config: Mapping[str, Any]) -> Settings:
    """What config.json, or a model's section in it, says of quantisation; empty where it says nothing."""
    sections = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    said = [section[key] for section in sections for key in _KEYS if section.get(key)]
    if not said:
        return {}
    settings = said[0] if isinstance(said[0], Mapping) else {"quant_method": said[0]}
    if "quant_method" in settings or not {"config_groups", "format"} & settings.keys():
        return settings
    return {**settings, "quant_method": "compressed-tensors"}  # older files leave it out


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config for dequantised weights."""
    return {
        key: without_quantisation(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _KEYS
    }

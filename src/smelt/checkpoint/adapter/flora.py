"""FLoRA (Si et al., 2024, https://arxiv.org/abs/2405.14739): an update as a Tucker product.

A module's tensors are ``param_0`` (in, r0), ``param_1`` (out, r1), ``param_2`` ... one per axis of the kernel, and
the core ``param_G`` (r0, r1, ...); its scale is a number ``scale`` beside them, or in the config for all modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ...errors import InputRejected, show
from ..base import Checkpoint, TensorInfo
from .config import Config
from .updates import Tucker

PART = re.compile(r"(.+)\.(param_G|param_\d|scale)")


def tuckers(file: Checkpoint, modules: Mapping[str, Mapping[str, TensorInfo]], config: Config) -> Iterator[Tucker]:
    """The update of each module. InputRejected for a factor that is missing or does not fit the core."""
    for module, parts in sorted(modules.items()):
        core = parts.get("param_G")
        wanted = [] if core is None else [f"param_{axis}" for axis in range(len(core.shape))]
        if core is None or set(wanted) != parts.keys() - {"param_G", "scale"} or len(wanted) < 2:
            names = ", ".join(sorted(parts))
            raise InputRejected(f"{file.label}: {show(module)} has {names}, expected param_G and a param_ per axis")
        factors = tuple(parts[name] for name in wanted)
        for size, factor in zip(core.shape, factors, strict=True):
            if len(factor.shape) != 2 or factor.shape[1] != size:
                shapes = f"{list(factor.shape)}, beside a core {list(core.shape)}"
                raise InputRejected(f"{file.label}: tensor {show(factor.name)} is {shapes}")
        yield Tucker(module, core, factors, _scale(file, parts, config), parts.get("scale"))


def _scale(file: Checkpoint, parts: Mapping[str, TensorInfo], config: Config) -> float:
    if "scale" not in parts:
        return config.number("scale")
    info = parts["scale"]
    if info.count != 1:
        raise InputRejected(f"{file.label}: tensor {show(info.name)} is {list(info.shape)}, expected one number")
    return float(file[info.name].reshape(-1)[0])

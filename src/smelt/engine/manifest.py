"""smelt-manifest.json: what a merge was made of, and the SHA-256 of everything it published.

Enough to verify the artefact byte by byte, and to repeat the run. Nothing in it depends on the machine or
the time: the same run gives the same manifest.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import storage
from .._version import __version__

NAME = "smelt-manifest.json"

#: The folder in the output that holds what it takes to add models later.
STATE_FOLDER = "smelt-state"

FORMAT = 1


def versions() -> dict[str, str]:
    """What computed the result."""
    from importlib.metadata import version

    return {
        "smelt": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in ("numba", "numpy")},
    }


def manifest(
    *, recipe: str, method: str, variant: str, seed: int, inputs: list[dict[str, Any]],
    statistics: list[dict[str, Any]], tensors: Mapping[str, Mapping[str, Any]], files: Mapping[str, str],
    notices: list[str], measured: Sequence[dict[str, Any]] = (), options: Mapping[str, Any] = MappingProxyType({}),
    state: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The manifest as plain data.

    ``tensors``: name -> dtype, shape, file, sha256; ``files``: name -> sha256; ``measured``: per model, the
    parameters that the recipe left to files; ``options``: those of the run that change bits; ``state``: what is
    known of the running state, where that is saved.
    """
    return {
        "format": FORMAT,
        "versions": versions(),
        "recipe": recipe,
        "method": method,
        "variant": variant,
        "seed": seed,
        "options": dict(options),
        "inputs": inputs,
        "statistics": statistics,
        "measured": list(measured),
        "input_digest": "xxh3-128 over tiles of 524288 elements, per tensor (over factors where they are merged "
        "themselves), then over 'name digest' lines",
        "notices": notices,
        **({} if state is None else {"state": dict(state)}),
        "files": dict(sorted(files.items())),
        "tensors": {name: dict(tensors[name]) for name in sorted(tensors)},
    }


def sums_of(folder: Path, files: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 of the side files, and of the indices of weight files and the GGUF file that ``folder`` has.

    Headers of safetensors follow from the tensors. That of GGUF says more, and blocks that differ can read alike.
    """
    beside = [name for name in storage.files_below(folder) if name.endswith((".safetensors.index.json", ".gguf"))]
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return sums | {name: sum_of(folder / name) for name in beside}


def sum_of(path: Path) -> str:
    """SHA-256 of a file of any size, read piece by piece."""
    digest = hashlib.sha256()
    for piece in storage.pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()

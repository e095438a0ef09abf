"""What one checkpoint holds, from its headers and config alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from ..architecture import Structure, comparable_facts
from ..checkpoint import Checkpoint, TensorInfo
from ..checkpoint.adapter import Adapter, Hadamard, Kronecker, LowRank, Saved
from ..kernels.dtypes import DTYPES
from .layers import by_layer


def contents(checkpoint: Checkpoint, structure: Structure) -> dict[str, Any]:
    """Totals, dtypes, files, folders, layers, roles, ties and config facts, as plain data.

    ``parameters`` counts the elements of floating tensors; quantised payloads count as stored.
    """
    infos = list(checkpoint.tensors.values())
    return {
        "model": checkpoint.label,
        "revision": checkpoint.revision,
        "tensors": len(infos),
        "parameters": sum(info.count for info in infos if DTYPES[info.dtype].floating),
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": _totals((info.dtype, info) for info in infos),
        "files": [{"name": file.path.name, "bytes": file.size} for file in checkpoint.files()],
        "parts": [part.folder or "." for part in checkpoint.parts],
        "stacks": [{"prefix": stack.prefix, "layers": stack.count} for stack in structure.stacks],
        "roles": _totals((structure[info.name].role, info) for info in infos),
        "tied": [list(group) for group in structure.tied_groups],
        "heads": list(structure.heads),
        "config": comparable_facts(checkpoint.config),
        "metadata": dict(checkpoint.metadata),
        "notices": [*getattr(checkpoint, "notices", ()), *structure.remarks],
    }


def adapter_contents(adapter: Adapter) -> dict[str, Any]:
    """What an adapter holds and changes, as plain data. ``base`` is what its author called the base."""
    infos = adapter.file.tensors.values()
    ranked = (update for update in adapter.updates if isinstance(update, LowRank | Hadamard | Kronecker))
    ranks = Counter(update.rank for update in ranked)
    return {
        "model": adapter.label,
        "revision": adapter.file.revision,
        "kind": adapter.kind,
        "base": adapter.config.base,
        "modules": len({update.target for update in adapter.updates}),
        "ranks": {str(rank): number for rank, number in sorted(ranks.items())},
        "stored_whole": sorted(update.target for update in adapter.updates if isinstance(update, Saved)),
        "parameters": sum(info.count for info in infos),
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": _totals((info.dtype, info) for info in infos),
        "files": [{"name": file.path.name, "bytes": file.size} for file in adapter.file.files()],
        "notices": list(adapter.file.notices),
    }


def _totals(pairs: Iterable[tuple[str, TensorInfo]]) -> dict[str, dict[str, int]]:
    """Tensors, elements and bytes per key, most bytes first."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "elements": 0, "bytes": 0})
    for key, info in pairs:
        found[key]["tensors"] += 1
        found[key]["elements"] += info.count
        found[key]["bytes"] += info.nbytes
    return dict(sorted(found.items(), key=lambda item: (-item[1]["bytes"], item[0])))


def tensor_rows(checkpoint: Checkpoint, structure: Structure) -> list[dict[str, Any]]:
    """One row per tensor, in order of depth: name, dtype, shape, file, and its place in the model."""
    return [
        {
            "name": name,
            "dtype": info.dtype,
            "shape": list(info.shape),
            "file": info.file,
            "role": structure[name].role,
            "layer": structure[name].layer,
            "expert": structure[name].expert,
            "depth": structure[name].depth,
        }
        for name, info in ((name, checkpoint.tensors[name]) for name in by_layer(structure, checkpoint.tensors))
    ]

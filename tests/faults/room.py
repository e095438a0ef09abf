"""11: what no run may take is not there: every method under a limit of the address space."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import smelt
from smelt.methods import Method
from tests.faults.campaign import WHOLE, Result, Share
from tests.faults.scene import Scene
from tests.given import save_statistics, statistics_for
from tests.recipes import recipe
from tests.small_models import Arrays, bf16, save
from tests.test_every_method import has_base, required

#: MiB: the least ``--memory``, and what the limit is above the budget.
BUDGET, BESIDE = 256, 512

#: Of the matrices. Three models of five such, in float32, take 960 MiB, the result 320.
HEIGHT, WIDTH = 65536, 256

#: Tried on models of ten times the budget each, too: sparse files of zeros.
LARGE = ("linear", "slerp", "ties", "dare_linear")


class Models:
    """A base and two fine-tunes, of ``count`` matrices, and recipes of every method over them."""

    def __init__(self, folder: Path, count: int, height: int = HEIGHT) -> None:
        self.folder = folder
        folder.mkdir()
        self.paths = [save(folder / f"m{seed}", bf16(_weights(count, height, seed)), config={}) for seed in range(3)]

    def recipe(self, method: Method, variant: str) -> Path:
        """With the least that the method needs, statistics among it."""
        chosen = required(method, variant)
        each = {p.name: chosen[p.name] for p in method.parameters if p.per_model and p.name in chosen}
        shared = {name: value for name, value in chosen.items() if name not in each}
        models = self.paths[1:][: method.max_models]
        tree = recipe(method.name, models, self.paths[0] if has_base(method) else None, each=each, parameters=shared)
        if method.statistics:
            given = statistics_for(method, chosen, [dict(smelt.load(model)) for model in models])
            for index, entry in enumerate(tree["models"][: len(given)] if any(given) else ()):
                entry["statistics"] = save_statistics(self.folder / f"statistics-{index}.safetensors", given[index])
        path = self.folder / "recipe.json"
        path.write_text(json.dumps(tree))
        return path


def _weights(count: int, height: int, seed: int) -> Arrays:
    base, tuned = (np.random.default_rng(n).standard_normal((1 << 18,)) for n in (0, seed + 1))
    values = (0.02 * base + 0.001 * seed * tuned).astype(np.float32)
    return {f"model.layers.{i}.mlp.down_proj.weight": np.resize(values, (height, WIDTH)) for i in range(count)}


def memory_is_short(place: Scene, trials: int | None, share: Share = WHOLE) -> Result:
    """Each method in each variant: done within the least budget, or refused with what is needed, and done with that."""
    result, every = Result("11 memory limit"), list(_methods())
    chosen = every if trials is None else random.Random(11).sample(every, trials)
    with tempfile.TemporaryDirectory(dir=place.folder) as home:
        _each(result, place, share.of(chosen), Path(home))
    return result


def _each(result: Result, place: Scene, chosen: Sequence[tuple[Method, str]], home: Path) -> None:
    small, large = Models(home / "small", 1, 512), Models(home / "large", 5)
    for method, variant in chosen:
        what = f"{method.name} ({variant})"
        code, told = _run(place, small.recipe(method, variant), 4096, None)  # compiles
        if code:
            result.problems.append(f"{what}: exit code {code}: {told}")
            continue
        _limited(result, place, what, large.recipe(method, variant))


def models_are_large(place: Scene, trials: int | None = None) -> Result:
    """Methods of each kind on models of ten times the budget."""
    result = Result("11 memory limit, models of ten times the budget")
    paths = [_sparse(place.folder / f"sparse{seed}", 10 * BUDGET << 20) for seed in range(3)]
    for name in LARGE[:trials]:
        method = smelt.methods.get(name)
        base, parameters = paths[0] if has_base(method) else None, required(method, method.variants[0])
        tree = recipe(name, paths[1:][: method.max_models], base, parameters=parameters)
        path = place.folder / "large.json"
        path.write_text(json.dumps(tree))
        _limited(result, place, name, path)
    return result


def _methods() -> Iterator[tuple[Method, str]]:
    for method in map(smelt.methods.get, smelt.methods.names()):
        yield from ((method, variant) for variant in method.variants if not method.needs_layers)


def _limited(result: Result, place: Scene, what: str, path: Path) -> None:
    """With the least budget; where that is refused, with the one that is named."""
    result.trials += 1
    code, told = _run(place, path, BUDGET, BUDGET + BESIDE)
    needed = re.search(r"(\d+)MiB are needed", told)
    if code == 2 and needed:
        result.counts["refused with what is needed, then done within that"] += 1
        code, told = _run(place, path, int(needed[1]), int(needed[1]) + BESIDE)
        what = f"{what} with {needed[1]}MiB"
    else:
        result.counts[f"done within {BUDGET} MiB"] += not code
    if code:
        result.problems.append(f"{what}: exit code {code}: {told[-500:]}")


def _run(place: Scene, path: Path, budget: int, limit: int | None) -> tuple[int, str]:
    """Exit code, and what was said. ``limit``: MiB of address space."""
    log = place.folder / "log"
    with place.trial() as out:
        arguments = ("merge", path, out, "--threads", 2, f"--memory={budget}MiB", "--force")
        code = place.server.run(*arguments, log=log, patience=1800, **({"space": limit << 20} if limit else {}))
        return code, log.read_text()


def _sparse(folder: Path, nbytes: int) -> str:
    """A model of zeros that takes no disk: matrices of 32 MiB."""
    folder.mkdir()
    size = HEIGHT * WIDTH * 2
    entries = {f"model.layers.{i}.mlp.down_proj.weight": _entry(i * size, size) for i in range(nbytes // size)}
    header = json.dumps(entries).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + nbytes // size * size)
    return str(folder)


def _entry(begin: int, size: int) -> dict[str, Any]:
    return {"dtype": "BF16", "shape": [HEIGHT, WIDTH], "data_offsets": [begin, begin + size]}

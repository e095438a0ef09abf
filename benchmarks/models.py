"""Write synthetic bf16 Llama checkpoints: a base, and fine-tunes that differ from it by small noise.

    python -m benchmarks.models 0.5B 1B

Weights are normal with standard deviation 2**-6. A task vector is Student-t noise with 4 degrees of
freedom, scaled by 2**-11: about 7e-4 in size with heavy tails, as fine-tuning leaves it, so that
magnitude trimming has something to find and many elements round back to the base's value.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from math import prod
from pathlib import Path
from zlib import crc32

import numpy as np
import numpy.typing as npt

from benchmarks.shapes import BASE, FINE_TUNES, SIZES, STATISTICS, Shape, model_dir

Floats = npt.NDArray[np.float32]
Patterns = npt.NDArray[np.uint16]

CHUNK = 1 << 18
# Not a multiple of the chunk or of any page, so that repeated noise never lines up with itself.
PERIOD = 4_194_301
SHARD_BYTES = 500_000_000
SPARE_BYTES = 4 << 30


def to_bf16(values: Floats) -> Patterns:
    """Round finite float32 to bfloat16 bit patterns, to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


class Noise:
    """One pool of random numbers, drawn once; every tensor reads it from a place of its own."""

    def __init__(self, pool: Floats) -> None:
        self._pool = np.concatenate([pool, pool[:CHUNK]])

    @classmethod
    def weights(cls, seed: int) -> Noise:
        """bf16 values already, so that a zero task vector gives the base back."""
        pool = np.random.default_rng(seed).standard_normal(PERIOD, dtype=np.float32) * np.float32(2**-6)
        return cls((to_bf16(pool).astype(np.uint32) << 16).view(np.float32))

    @classmethod
    def task_vector(cls, seed: int) -> Noise:
        return cls((np.random.default_rng(seed).standard_t(4, PERIOD) * 2**-11).astype(np.float32))

    def chunks(self, name: str, count: int) -> Iterator[Floats]:
        """``count`` numbers in pieces of at most :data:`CHUNK`; the same for the same name."""
        place = crc32(name.encode()) % PERIOD
        for start in range(0, count, CHUNK):
            at = (place + start) % PERIOD
            yield self._pool[at : at + min(CHUNK, count - start)]


@dataclass(frozen=True, slots=True)
class Weights:
    """The values of one synthetic model: the shared base, plus its own task vector if it has one."""

    base: Noise
    task_vector: Noise | None = None

    def patterns(self, name: str, count: int) -> Iterator[Patterns]:
        """bfloat16 bit patterns of the tensor ``name``, piece by piece."""
        centre = np.float32(1 if "norm" in name else 0)
        for values, delta in zip(self.base.chunks(name, count), self._deltas(name, count), strict=False):
            yield to_bf16(values + centre + delta)

    def _deltas(self, name: str, count: int) -> Iterable[Floats | np.float32]:
        return self.task_vector.chunks(name, count) if self.task_vector else repeat(np.float32(0))


@dataclass(frozen=True, slots=True)
class Curvature:
    """A statistic of a synthetic fine-tune: the size of other noise."""

    noise: Noise

    def patterns(self, name: str, count: int) -> Iterator[Patterns]:
        for values in self.noise.chunks(name, count):
            yield to_bf16(np.abs(values))


def plan_shards(tensors: dict[str, tuple[int, ...]], limit: int = SHARD_BYTES) -> list[list[str]]:
    """Fill shards in model order; a tensor larger than ``limit`` has a shard of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in tensors.items():
        size = 2 * prod(shape)
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def shard_names(count: int) -> list[str]:
    """File names as ``save_pretrained`` gives them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def header(tensors: dict[str, tuple[int, ...]]) -> bytes:
    """The safetensors header of these bf16 tensors, length prefix included."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + 2 * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], weights: Weights | Curvature) -> None:
    with path.open("wb") as file:
        file.write(header(tensors))
        for name, shape in tensors.items():
            for patterns in weights.patterns(name, prod(shape)):
                file.write(patterns.tobytes())
        # A dirty page cannot be dropped from the cache, nor may it be written back while something is timed.
        os.fsync(file.fileno())


def write_model(folder: Path, shape: Shape, weights: Weights | Curvature, limit: int = SHARD_BYTES) -> None:
    """Write one model in the Hugging Face layout into an existing ``folder``."""
    tensors = shape.tensors()
    shards = plan_shards(tensors, limit)
    files = shard_names(len(shards))
    for file, names in zip(files, shards, strict=True):
        write_shard(folder / file, {name: tensors[name] for name in names}, weights)
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": shape.nbytes}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", shape.config())
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of three tokens: enough to be copied along."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
        },
    )
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def ensure(size: str, seed: int = 0, statistics: bool = False) -> None:
    """Write the models of ``size`` that are not there yet. A folder that exists is complete."""
    wanted = (BASE, *FINE_TUNES, *(STATISTICS.values() if statistics else ()))
    missing = [model for model in wanted if not model_dir(size, model).exists()]
    if not missing:
        return
    check_space(size, len(missing) + 1)
    base = Noise.weights(seed)
    for model in missing:
        publish(model_dir(size, model), SIZES[size], _values(model, base, seed))


def _values(model: str, base: Noise, seed: int) -> Weights | Curvature:
    if model == BASE:
        return Weights(base)
    if model in FINE_TUNES:
        return Weights(base, Noise.task_vector(seed + 1 + FINE_TUNES.index(model)))
    return Curvature(Noise.task_vector(seed + 101 + list(STATISTICS.values()).index(model)))


def check_space(size: str, copies: int) -> None:
    """Refuse to fill the disk: ``copies`` counts the output of a merge too."""
    parent = model_dir(size, BASE).parent
    parent.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(parent).free, copies * SIZES[size].nbytes + SPARE_BYTES
    if free < needed:
        raise SystemExit(f"{size} needs {needed / 1e9:.0f} GB of free disk, there are {free / 1e9:.0f} GB")


def publish(folder: Path, shape: Shape, weights: Weights | Curvature) -> None:
    staging = folder.with_name(folder.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    write_model(staging, shape, weights)
    staging.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the synthetic checkpoints of these sizes.")
    parser.add_argument("sizes", nargs="+", choices=SIZES)
    parser.add_argument("--statistics", action="store_true", help="also what methods weight parameters by")
    options = parser.parse_args()
    for size in options.sizes:
        ensure(size, statistics=options.statistics)


if __name__ == "__main__":
    main()

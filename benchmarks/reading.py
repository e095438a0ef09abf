"""How fast weights are read that are computed on the way: python -m benchmarks.reading

Quantised matrices, blocks of GGUF, and a base with an adapter, all in memory, in tiles, by one thread: GB of output per
second, the best of five readings. Recorded as a session, which ``benchmarks.report`` puts into RESULTS.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from time import strftime

import numpy as np
import numpy.typing as npt

from benchmarks import report
from benchmarks.entrants import versions
from benchmarks.quantised import COLUMNS, ROWS, cases
from benchmarks.records import Reading, Session, command_line, machine
from benchmarks.shapes import bench_dir
from smelt.checkpoint import Checkpoint, load_adapted
from smelt.checkpoint.adapter import parse
from smelt.checkpoint.memory import MemoryCheckpoint
from smelt.checkpoint.quantised import dequantised
from smelt.engine.tiles import TILE
from smelt.kernels.blocks import BLOCK_TYPES, unpack
from smelt.kernels.dtypes import DTYPES


def quantised() -> Iterator[Reading]:
    for label, (stored, settings) in cases().items():
        checkpoint = MemoryCheckpoint(stored, label)
        checkpoint.config = {"quantization_config": settings}
        (name,) = dequantised(checkpoint).tensors
        yield _reading(label, [dequantised(checkpoint) for _ in range(5)], name)


def _reading(label: str, checkpoints: list[Checkpoint], name: str) -> Reading:
    """``checkpoints`` are alike; each is read once, so that none has kept anything."""
    best = min(_seconds(checkpoint, name) for checkpoint in checkpoints)
    info = checkpoints[0].tensors[name]
    return Reading(label, info.dtype, info.nbytes / best / 1e9)


def _seconds(checkpoint: Checkpoint, name: str) -> float:
    """To read a tensor once, tile by tile."""
    info = checkpoint.tensors[name]
    out = np.empty(TILE, DTYPES[info.dtype].storage)
    begin = time.perf_counter()
    for start in range(0, info.count, TILE):
        checkpoint.read(name, start, out[: info.count - start])
    return time.perf_counter() - begin


def gguf() -> Iterator[Reading]:
    for kind, block in BLOCK_TYPES.items():
        blocks = np.random.default_rng(0).integers(0, 120, TILE // block.elements * block.size, np.uint8)
        out = np.empty(TILE, np.float32)
        best = min(_unpacking(kind, blocks, out) for _ in range(50))
        yield Reading(f"GGUF {kind}", "F32", out.nbytes / best / 1e9)


def _unpacking(kind: str, blocks: npt.NDArray[np.uint8], out: npt.NDArray[np.float32]) -> float:
    begin = time.perf_counter()
    unpack(kind, blocks, out)
    return time.perf_counter() - begin


def adapted() -> Iterator[Reading]:
    random = np.random.default_rng(0)
    base = MemoryCheckpoint({"x.weight": random.integers(0, 16000, (ROWS, COLUMNS), np.uint16).view("<f2")}, "base")
    for rank in (16, 64):
        factors = {
            "base_model.model.x.lora_A.weight": random.standard_normal((rank, COLUMNS), np.float32),
            "base_model.model.x.lora_B.weight": random.standard_normal((ROWS, rank), np.float32),
        }
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
        adapter = parse(MemoryCheckpoint(factors, "adapter"), config)
        models = [load_adapted(base, [(adapter, 1.0)], "adapted") for _ in range(5)]
        yield _reading(f"LoRA of rank {rank} on float16", models, "x.weight")


def main() -> None:
    session = Session(command_line("benchmarks.reading", sys.argv[1:]), machine(bench_dir()), versions(["smelt"]))
    session.readings = [*quantised(), *gguf(), *adapted()]
    path = report.sessions_dir() / f"{strftime('%Y%m%d-%H%M%S')}-reading.json"
    session.save(path)
    print(report.reading_table(session.readings))
    print(f"recorded in {path}")


if __name__ == "__main__":
    main()

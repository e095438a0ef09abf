"""Merge adapters of one base: from their factors, and from the models that they make of it.

    python -m benchmarks.matrix_adapters --layers 24               # a model of Qwen2.5-0.5B's shapes, knots and tsv
    python -m benchmarks.matrix_adapters --layers 1 --folded       # the folded models as well: they take long
    python -m benchmarks.matrix --report                           # MATRIX.md, these figures among the others

Base, adapters (rank 16, all linear layers) and folded models are made for each run and thrown away.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import matrix_model
from benchmarks.shapes import Shape

QWEN = Shape(layers=24, hidden=896, inner=4864, heads=14, kv_heads=2, vocabulary=151936, tied=True)
TASKS, RANK = 4, 16


# --- the inputs: made by a process of its own, since the one that measures must stay small -----------------------


def make(home: Path, layers: int) -> None:
    """The base and its adapters."""
    from benchmarks import models

    shape = replace(QWEN, layers=layers)
    (home / "base").mkdir()
    models.write_model(home / "base", shape, models.Weights(models.Noise.weights(0)), models.SHARD_BYTES)
    for seed in range(TASKS):
        adapter(home / f"adapter{seed}", shape, seed)


def adapter(folder: Path, shape: Shape, seed: int) -> None:
    """Products of standard deviation 2**-11, as :mod:`benchmarks.models` has task vectors."""
    import numpy as np
    from safetensors.numpy import save_file

    draw, tensors = np.random.default_rng(seed), {}
    for name in (name for name in shape.tensors() if "_proj" in name):
        rows, columns = shape.tensors()[name]
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = draw.standard_normal((RANK, columns), np.float32) / 64
        tensors[f"{module}.lora_B.weight"] = draw.standard_normal((rows, RANK), np.float32) / 128
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in shape.tensors() if "_proj" in name})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


# --- one measurement ------------------------------------------------------------------------------------------


def measured(method: str, layers: int, folded: bool, memory: str, threads: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        home, base = Path(scratch), Path(scratch) / "base"
        command = [sys.executable, "-m", "benchmarks.matrix_adapters", "--make", scratch, "--layers", str(layers)]
        subprocess.run(command, check=True)
        ways = {"factors": [f"{base}+{home / f'adapter{task}'}" for task in range(TASKS)]}
        if folded:
            ways["models"] = [fold(model, home / f"model{i}") for i, model in enumerate(ways["factors"])]
        return [
            {**matrix_model.merged(method, str(base), given, memory, threads), "layers": layers, "way": way}
            for way, given in ways.items()
        ]


def fold(model: str, out: Path) -> str:
    subprocess.run([sys.executable, "-m", "smelt", "convert", model, str(out)], check=True, stdout=subprocess.DEVNULL)
    return str(out)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | layers | merged from | threads | wall s | CPU s | planned MB | peak MB | anonymous MB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: (row["model"], row["layers"], row["way"])):
        sizes = " | ".join(f"{row[kind] / 1e6:.0f}" for kind in ("planned", "peak", "anonymous"))
        lines.append(
            f"| {row['model']} | {row['layers']} | {row['way']} | {row['threads']} | {row['wall']:.1f} | "
            f"{row['cpu']:.1f} | {sizes} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a merge of adapters costs, from factors and from models.")
    parser.add_argument("--methods", default="knots,tsv")
    parser.add_argument("--layers", type=int, default=QWEN.layers)
    parser.add_argument("--folded", action="store_true")
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--records", type=Path, default=Path(os.environ.get("BENCH_DIR", ".bench")) / "matrix")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make, options.layers)
        return
    options.records.mkdir(parents=True, exist_ok=True)
    for method in options.methods.split(","):
        for row in measured(method, options.layers, options.folded, options.memory, options.threads):
            path = options.records / f"adapters-{method}-{row['way']}-{options.layers}.json"
            path.write_text(json.dumps(row))
            print(table([row]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()

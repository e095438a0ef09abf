"""Merge a model by methods on whole matrices, as a process of its own, and say what it costs.

    python -m benchmarks.matrix_model --base B --models C D E F      # tsv and wudi, two threads, --memory 2GB
    python -m benchmarks.matrix --report                             # MATRIX.md, these figures among the others

Wall and CPU seconds, the peak of the process as the kernel counted it (mapped files included) and that of its
anonymous memory, beside what ``smelt`` planned.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import measure


def merged(method: str, base: str, models: list[str], memory: str, threads: int) -> dict[str, Any]:
    """The cost of one merge, whose result is thrown away."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Path(scratch) / "recipe.json"
        tree = {"merge_method": method, "base_model": base, "models": [{"model": model} for model in models]}
        recipe.write_text(json.dumps({**tree, "dtype": "bfloat16"}))
        command = [sys.executable, "-m", "smelt", "merge", str(recipe), "--memory", memory, "--threads", str(threads)]
        plan = subprocess.run([*command, "--dry-run", "--json"], check=True, stdout=subprocess.PIPE).stdout
        cost = measure.run([*command, str(Path(scratch) / "out")], log=Path(scratch) / "log")
        size = sum(file.stat().st_size for file in (Path(scratch) / "out").glob("*.safetensors"))
        shutil.rmtree(Path(scratch) / "out")
    return {
        "model": method, "models": len(models), "memory": memory, "threads": threads, "bytes": size,
        "planned": json.loads(plan)["peak_memory"], "wall": cost.wall, "cpu": cost.cpu, "peak": cost.peak,
        "anonymous": cost.peak_anonymous, "foreign": cost.foreign, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | model | fine-tunes | --memory | threads | wall s | CPU s | planned MB | peak MB | anonymous MB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: str(row["model"])):
        sizes = " | ".join(f"{row[kind] / 1e6:.0f}" for kind in ("planned", "peak", "anonymous"))
        lines.append(
            f"| {row['model']} | {row['bytes'] / 1e9:.2f} GB | {row['models']} | {row['memory']} | {row['threads']} | "
            f"{row['wall']:.0f} | {row['cpu']:.0f} | {sizes} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a merge by matrix methods costs.")
    parser.add_argument("--base", required=True)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--methods", default="tsv,wudi")
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--records", type=Path, default=Path(os.environ.get("BENCH_DIR", ".bench")) / "matrix")
    options = parser.parse_args()
    options.records.mkdir(parents=True, exist_ok=True)
    for method in options.methods.split(","):
        row = merged(method, options.base, options.models, options.memory, options.threads)
        (options.records / f"model-{method}.json").write_text(json.dumps(row))
        print(table([row]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()

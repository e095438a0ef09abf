"""Time the methods on whole matrices against the straightforward way, side by side in one run.

    python -m benchmarks.matrix                                # all methods, all shapes, one thread
    python -m benchmarks.matrix --methods tsv,iso --shapes 1024x1024 --threads 2 --layer
    python -m benchmarks.matrix --report                       # MATRIX.md from what was measured

Four fine-tunes of one matrix, fp32; the singular values of a task vector fall as i^-0.7 from 1, a tenth of them is
shared by all. Each measurement is a process of its own (:mod:`benchmarks.plain` or ``smelt.merge_tensors``), pinned to
as many cores as ``--threads``; the best of the rounds counts, the sides take turns. With ``--layer`` there are four
such matrices, which smelt merges on all threads at once, as it does with a model, while the straightforward way gives
all threads to numpy. Peak memory is what the process had more than before the merge; the error is that of the merged
task vector (the merged matrix where there is no base), relative, against :mod:`benchmarks.plain` in fp64.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Event, Thread
from typing import Any

from benchmarks import matrix_adapters, matrix_model, plain

SHAPES = ("1024x1024", "896x4864", "4864x896")
TASKS = 4
#: smelt's method, and parameters, behind each name; descent takes ``plain.STEPS`` steps on both sides. WUDI's default
#: flavour (aswudi) takes none; the paper's takes ``PAPER_STEPS``.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "tsv": ("tsv", {}),
    "r_tsvm": ("r_tsvm", {"rank_rule": "uniform"}),
    "iso": ("iso", {"variant": "iso_c"}),
    "iso_cts": ("iso", {"variant": "iso_cts"}),
    "knots": ("knots", {"scope": "tensor"}),
    "opcm": ("opcm", {}),
    "lore": ("lore", {"threshold": 0.1, "max_iter": 3}),
    "wudi": ("wudi", {"variant": "wudi", "iter_num": 20}),
    "aswudi": ("wudi", {"variant": "aswudi"}),
    "doge": ("doge", {"steps": 20}),
    "optmerge": ("optmerge", {"mode": "full", "iter_num": 20}),
    "regmean": ("regmean", {"reduce_non_diagonal_ratio": 0.9}),
    "widen": ("widen", {}),
}
PAPER_STEPS = 300
BASELESS = ("lore", "regmean")
PAGE = os.sysconf("SC_PAGE_SIZE")


# --- one measurement: a process of its own --------------------------------------------------------------------


def inputs(shape: tuple[int, int], seed: int, grams: bool) -> tuple[Any, list[Any], list[Any]]:
    """Base, fine-tunes and, where wanted, Gram matrices, all fp32."""
    import numpy as np

    draw, short = np.random.default_rng([seed, *shape]), min(shape)

    def directions(rows: int) -> Any:
        return np.linalg.qr(draw.standard_normal((rows, short)))[0]

    sigma = np.arange(1, short + 1.0) ** -0.7
    shared = draw.standard_normal((shape[0], short // 10)) @ draw.standard_normal((short // 10, shape[1]))
    deltas = [(directions(shape[0]) * sigma) @ directions(shape[1]).T for _ in range(TASKS)]
    size = np.linalg.norm(deltas[0])
    base = draw.standard_normal(shape).astype(np.float32) / 64
    models = [(base + delta + 0.1 * size * shared / np.linalg.norm(shared)).astype(np.float32) for delta in deltas]
    seen = [draw.standard_normal((2 * shape[1], shape[1])).astype(np.float32) for _ in range(TASKS if grams else 0)]
    return base, models, [x.T @ x / len(x) for x in seen]


def merge_by_smelt(name: str, given: list[tuple[Any, list[Any], list[Any]]], threads: int) -> list[Any]:
    import smelt

    method, parameters = METHODS[name]
    base = {f"layers.{i}.w": base for i, (base, _, _) in enumerate(given)}
    models = [{f"layers.{i}.w": models[t] for i, (_, models, _) in enumerate(given)} for t in range(TASKS)]
    grams = [{"gram": {f"layers.{i}.w": g[t] for i, (_, _, g) in enumerate(given) if g}} for t in range(TASKS)]
    out = smelt.merge_tensors(
        method, models, None if name in BASELESS else base, parameters=parameters, dtype="float64", threads=threads,
        statistics=grams if name == "regmean" else None,
    )  # fmt: skip
    return [out[key] if name in BASELESS else out[key] - base[key] for key in base]


def merge_plainly(name: str, given: list[tuple[Any, list[Any], list[Any]]], dtype: Any) -> list[Any]:
    from benchmarks.plain import PLAIN

    def one(base: Any, models: list[Any], grams: list[Any]) -> Any:
        more = {"grams": [gram.astype(dtype, copy=False) for gram in grams]} if grams else {}
        return PLAIN[name](base.astype(dtype, copy=False), [m.astype(dtype, copy=False) for m in models], **more)

    return [one(*each) for each in given]


def measure(side: str, name: str, shape: tuple[int, int], count: int, threads: int, out: Path) -> dict[str, float]:
    """Wall seconds and bytes beyond those of the inputs; the result goes to ``out``."""
    import numpy as np

    given = [inputs(shape, seed, name == "regmean") for seed in range(count)]
    if side == "smelt":
        merge_by_smelt(name, [inputs((16, 24), 0, name == "regmean")], 1)  # imports and compiles
    with Peak() as peak:
        started = time.perf_counter()
        if side == "smelt":
            found = merge_by_smelt(name, given, threads)
        else:
            found = merge_plainly(name, given, np.float64 if side == "oracle" else np.float32)
        wall = time.perf_counter() - started
    np.save(out, np.stack(found))
    return {"wall": wall, "peak": peak.bytes}


class Peak:
    """The most resident memory beyond that at the start, sampled."""

    def __init__(self) -> None:
        self.bytes, self._stop = 0, Event()
        self._before = self._resident()
        self._thread = Thread(target=self._watch, daemon=True)

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, self._resident() - self._before)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


# --- many of them ---------------------------------------------------------------------------------------------


def compare(name: str, shape: str, count: int, threads: int, rounds: int) -> dict[str, Any]:
    """Both sides in turns, and their errors."""
    import numpy as np

    with tempfile.TemporaryDirectory() as scratch:
        kept = {side: Path(scratch) / f"{side}.npy" for side in ("plain", "smelt", "oracle")}
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in kept}
        for side in ("smelt", "plain") * rounds + ("oracle",):
            runs[side].append(_run(side, name, shape, count, threads, kept[side]))
        truth = np.load(kept["oracle"])
        errors = {side: float(np.linalg.norm(np.load(kept[side]) - truth) / np.linalg.norm(truth)) for side in kept}
    found: dict[str, Any] = {"method": name, "shape": shape, "matrices": count, "threads": threads}
    for side in ("smelt", "plain"):
        found[side] = {
            "wall": min(run["wall"] for run in runs[side]), "peak": max(run["peak"] for run in runs[side]),
            "error": errors[side],
        }  # fmt: skip
    return found


def _run(side: str, name: str, shape: str, count: int, threads: int, out: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.matrix", "--one", side, "--methods", name, "--shapes", shape]
    command += ["--threads", str(threads), "--matrices", str(count), "--out", str(out)]
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads))}
    found: dict[str, float] = json.loads(
        subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | matrices | threads | straightforward s | smelt s | times faster | peak MB | smelt MB | "
        "error fp32 | smelt error |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted([*rows, *closed_forms(rows)], key=_place):
        theirs, ours = row["plain"], row["smelt"]
        what = f"{row['matrices']} x {row['shape']}" if row["matrices"] > 1 else row["shape"]
        lines.append(
            f"| {row['method']} | {what} | {row['threads']} | {theirs['wall']:.2f} | {ours['wall']:.2f} | "
            f"{theirs['wall'] / ours['wall']:.1f} | {theirs['peak'] / 1e6:.0f} | {ours['peak'] / 1e6:.0f} | "
            f"{theirs['error']:.0e} | {ours['error']:.0e} |"
        )
    return "\n".join(lines)


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return list(METHODS).index(row["method"].partition(",")[0]), row["method"], row["threads"], row["shape"]


def closed_forms(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """WUDI as it is used: the default flavour against the paper's steps, as many times as long as those measured."""
    found = {(row["method"], row["shape"], row["matrices"], row["threads"]): row for row in rows}
    return [
        {**row, "method": "wudi, default", "plain": {**stepped["plain"], "wall": stepped["plain"]["wall"] * more}}
        for (method, *rest), row in found.items()
        if method == "aswudi" and (stepped := found.get(("wudi", *rest))) for more in [PAPER_STEPS // plain.STEPS]
    ]  # fmt: skip


PAGE_TEXT = """# Matrix methods against the straightforward way

Made by `python -m benchmarks.matrix --report` from what `python -m benchmarks.matrix` measured; its first lines say
how. Descent takes 20 steps on both sides, LoRE three rounds. The straightforward way is `benchmarks/plain.py` in
fp32; errors are relative to the same in fp64. numpy computes SVDs of fp32 matrices in fp64 too (PyTorch's, in fp32,
take two thirds of the time); smelt computes all in fp64 but the products inside steps of descent. An SVD of a square
matrix takes three times as long as the eigenproblem that stands for it, one of a long matrix four times. Where the
straightforward way is a product or an inverse in fp32 (RegMean, WIDEN), fp64 costs twice as much. WUDI's default
flavour (aswudi) takes no steps, the paper's takes 300. "wudi, default" is the former against the latter, as the
authors run it: the time of the 20 steps of row "wudi" fifteen times, and each side's error against its own method.
Rows of four matrices have two threads on both sides: one matrix each for smelt, two per product or SVD for numpy.

"""


MODEL_TEXT = """
## A whole model

Made by `python -m benchmarks.matrix_model` ({date}), a process of its own: a Llama of 8 layers (hidden size 2048,
feed-forward 5632, 32000 tokens, bfloat16) and four fine-tunes. TSV takes apart all matrices, both tables of tokens
among them; WUDI (aswudi) solves all but the head, and is held up by eight eigenproblems of 5632 x 5632, which run one
at a time where two do not fit. Peak memory is the kernel's count, mapped files included.

"""

ADAPTERS_TEXT = """
## Adapters of one base

Made by `python -m benchmarks.matrix_adapters` ({date}), each merge a process of its own: a base of Qwen2.5-0.5B's
shapes (hidden size 896, feed-forward 4864, 151936 tokens, bfloat16), whole or cut to a single layer, and four
adapters of rank 16 on all linear layers. "factors": the recipe names base+adapter, and the matrices of the models are
never made. "models": the same adapters folded into the base beforehand, which is not timed. Times hold the start of
the program and the copy of the embedding; where they exceed CPU seconds by much, other work ran beside.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Time matrix methods against the straightforward way.")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layer", action="store_true", help="four matrices at once")
    parser.add_argument("--records", type=Path, default=Path(os.environ.get("BENCH_DIR", ".bench")) / "matrix")
    parser.add_argument("--report", action="store_true", help="only write MATRIX.md")
    parser.add_argument("--one", choices=("smelt", "plain", "oracle"), help=argparse.SUPPRESS)
    parser.add_argument("--matrices", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        rows, columns = map(int, options.shapes.split("x"))
        shape, count = (rows, columns), options.matrices
        print(json.dumps(measure(options.one, options.methods, shape, count, options.threads, options.out)))
        return
    options.records.mkdir(parents=True, exist_ok=True)
    if not options.report:
        _measure_all(options)
    rows = [json.loads(path.read_text()) for path in sorted(options.records.glob("*.json"))]
    models = [row for row in rows if "model" in row and "way" not in row]
    adapters = [row for row in rows if "way" in row]
    text = PAGE_TEXT + table([row for row in rows if "method" in row]) + "\n"
    if models:
        text += MODEL_TEXT.format(date=max(row["date"] for row in models)) + matrix_model.table(models) + "\n"
    if adapters:
        text += ADAPTERS_TEXT.format(date=max(row["date"] for row in adapters)) + matrix_adapters.table(adapters) + "\n"
    Path(__file__).with_name("MATRIX.md").write_text(text)


def _measure_all(options: argparse.Namespace) -> None:
    count = 4 if options.layer else 1
    for name in options.methods.split(","):
        for shape in options.shapes.split(","):
            row = compare(name, shape, count, options.threads, options.rounds)
            path = options.records / f"{name}-{shape}-{count}-{options.threads}.json"
            path.write_text(json.dumps(row))
            print(table([row]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()

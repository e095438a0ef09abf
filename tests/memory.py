"""Does everything keep to its ``--memory``? ``python -m tests.memory [METHOD or KIND]...`` tells.

Each method in each variant merges three fine-tunes of a base of two square matrices, on 1, 2 and 4 threads: with the
least budget that is accepted, with half as much again, and with one that is too small by a mebibyte, which must be
refused in one line with the least one named. The kinds are inputs and outputs of other forms, and other commands.
Every run is a process of its own, once its functions are compiled; measured is its largest resident set. ``idle`` is
that of the same with next to nothing. The exit code is 1 when a run takes over 15 % more than it may, or gives other
bytes than with another budget.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

import smelt
from smelt.methods import Method
from tests.gguf_files import save_llama
from tests.given import save_statistics, statistics_for
from tests.lora_files import factors, save_adapter
from tests.recipes import recipe
from tests.small_models import CONFIG, VOCAB, Arrays, bf16, fine_tuned, save
from tests.test_every_method import has_base, required
from tests.vocabularies import tokenizer

#: Of the budget.
ALLOWED = 1.15

#: The kernel's other figure, ru_maxrss, begins at what the process that forked had.
COMMAND = """
import re, sys
from smelt.cli import main
try:
    code = main(sys.argv[2:])
except SystemExit as end:
    code = end.code
with open(sys.argv[1], "w") as told:
    told.write(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
sys.exit(code)
"""


@dataclass(frozen=True)
class Run:
    """What became of a command: exit code, most resident bytes, what it said on stderr."""

    code: int
    peak: int
    error: str


def run(*arguments: str | Path) -> Run:
    """``smelt`` with these arguments, in a process of its own."""
    with tempfile.NamedTemporaryFile("r") as told:
        command = [sys.executable, "-c", COMMAND, told.name, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        return Run(done.returncode, int(told.read() or 0) << 10, done.stderr.strip())


# --- what is merged -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """A base and its fine-tunes, and for each method a recipe over them. ``side``: of the matrices."""

    folder: Path
    base: str
    tuned: tuple[str, ...]
    side: int

    @classmethod
    def make(cls, folder: Path, side: int, count: int = 3) -> Models:
        folder.mkdir()
        base = weights(side)
        paths = [
            save(folder / f"tuned{seed}", bf16(fine_tuned(base, seed)), config=config(side)) for seed in range(count)
        ]
        return cls(folder, save(folder / "base", bf16(base), config=config(side)), tuple(paths), side)

    def tree(self, method: Method, variant: str) -> dict[str, Any]:
        """The least that the method needs, statistics among it."""
        chosen = required(method, variant)
        each = {p.name: chosen[p.name] for p in method.parameters if p.per_model and p.name in chosen}
        shared = {name: value for name, value in chosen.items() if name not in each}
        models = self.tuned[: method.max_models]
        tree = recipe(method.name, models, self.base if has_base(method) else None, each=each, parameters=shared)
        if method.statistics:
            given = statistics_for(method, chosen, [dict(smelt.load(model)) for model in models])
            for index, entry in enumerate(tree["models"][: len(given)] if any(given) else ()):
                path = self.folder / f"{method.name}-{variant}-{index}.safetensors"
                entry["statistics"] = save_statistics(path, given[index])
        return tree


def weights(side: int) -> Arrays:
    random = np.random.default_rng(side)
    matrices = {f"model.layers.{i}.mlp.up_proj.weight": (side, side) for i in range(2)}
    shapes = {"model.embed_tokens.weight": (VOCAB, side), **matrices, "model.norm.weight": (side,)}
    return {name: (random.standard_normal(shape) * 0.02).astype(np.float32) for name, shape in shapes.items()}


def config(side: int) -> dict[str, Any]:
    return {
        **CONFIG,
        "hidden_size": side,
        "intermediate_size": side,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    }


# --- budgets ------------------------------------------------------------------------------------------------

#: What is run but for budget, threads and destination, and the options that it takes.
Command = tuple[str | Path, ...]


def merge_of(tree: Mapping[str, Any], folder: Path) -> Command:
    path = folder / "recipe.json"
    path.write_text(json.dumps(tree))
    return "merge", "--force", path


@dataclass(frozen=True)
class Row:
    """Budgets in MiB and peaks in bytes."""

    name: str
    threads: int
    idle: int
    budgets: tuple[int, ...]
    peaks: tuple[int, ...]
    problems: tuple[str, ...]

    @property
    def worst(self) -> float:
        """The largest share of a budget that was used."""
        return max((peak / (budget << 20) for peak, budget in zip(self.peaks, self.budgets, strict=True)), default=0.0)

    @property
    def is_bad(self) -> bool:
        return self.worst > ALLOWED or bool(self.problems)

    def __str__(self) -> str:
        cells = [self.name, self.threads, self.idle >> 20, *self.budgets, *(peak >> 20 for peak in self.peaks)]
        return "| " + " | ".join(map(str, cells)) + f" | {self.worst:.2f} | {'; '.join(self.problems)} |"


def budgeted(command: Command, budget: int, threads: int, out: Path) -> Run:
    shutil.rmtree(out, ignore_errors=True)
    return run("--quiet", *command, out, f"--memory={budget}MiB", f"--threads={threads}")


def least(command: Command, threads: int, out: Path) -> tuple[int, Run]:
    """The least budget in MiB, as the refusals of smaller ones say, and what became of the run with it."""
    lowest = 1
    while (done := budgeted(command, lowest, threads, out)).code == 2:
        named = re.search(r"(\d+)MiB are needed|at least (\d+)MiB", done.error)
        if named is None or int(named[1] or named[2]) <= lowest:
            break
        lowest = int(named[1] or named[2])
    return lowest, done


def measured(name: str, command: Command, threads: int, idle: int, out: Path) -> Row:
    """A run with each budget."""
    lowest, first = least(command, threads, out)
    before, more = digest(out), lowest * 3 // 2
    second = budgeted(command, more, threads, out)
    problems = [done.error.splitlines()[-1] for done in (first, second) if done.code]
    if not problems and digest(out) != before:
        problems.append("the bytes depend on the budget")
    refused = budgeted(command, lowest - 1, threads, out)
    if lowest > 1 and (refused.code != 2 or f"{lowest}MiB" not in refused.error or "\n" in refused.error):
        problems.append(f"{lowest - 1}MiB: {refused.code} {refused.error}")
    return Row(name, threads, idle, (lowest, more), (first.peak, second.peak), tuple(problems))


def digest(folder: Path) -> str:
    weights = [path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".gguf")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()


# --- every method -------------------------------------------------------------------------------------------


def of_methods(names: list[str], threads: list[int], sides: tuple[int, int], home: Path) -> Iterator[Row]:
    made = {side: Models.make(home / f"side{side}", side) for side in {64, *sides}}
    small, elements, matrices = (made[side] for side in (64, *sides))
    for method in map(smelt.methods.get, names):
        for variant in method.variants:
            name = f"{method.name} ({variant})" if len(method.variants) > 1 else method.name
            tree = elements.tree(method, variant)
            larger = matrices.tree(method, variant) if holds_matrices(tree) else tree
            idle = idle_of(merge_of(small.tree(method, variant), small.folder), home / "out")
            for count in threads:
                yield measured(name, merge_of(larger, home), count, idle, home / "out")


def idle_of(command: Command, out: Path) -> int:
    """Of the second of two runs: the first one compiles."""
    return [budgeted(command, 4096, 1, out).peak for _ in range(2)][1]


def holds_matrices(tree: Mapping[str, Any]) -> bool:
    plan = smelt.plan(tree, memory="64GiB", threads=1)
    plan.close()
    return any(plan.budget.matrix(output) for output in plan.outputs)


# --- other inputs, outputs and commands ---------------------------------------------------------------------


def adapted(models: Models) -> Command:
    """Adapters on a base."""
    modules = {f"model.layers.{i}.mlp.up_proj": (models.side, models.side) for i in range(2)}
    names = [save_adapter(models.folder / f"adapter{i}", factors(16, i, modules)) for i in range(2)]
    return merge_of(recipe("ties", [f"{models.base}+{name}" for name in names], models.base), models.folder)


def gguf(models: Models) -> Command:
    """Fine-tunes in Q8_0."""
    files = [models.folder / f"{seed}.gguf" for seed in range(2)]
    for seed, file in enumerate(files):
        save_llama(file, fine_tuned(weights(models.side), seed), quantised=True)
    return merge_of(recipe("ties", files, models.base), models.folder)


def gptq(models: Models) -> Command:
    """Fine-tunes in four bits, which are stored turned."""
    return merge_of(recipe("ties", [_gptq(models, seed) for seed in range(2)], models.base), models.folder)


def _gptq(models: Models, seed: int) -> str:
    random, side = np.random.default_rng(seed), models.side
    arrays = {name: array for name, array in bf16(weights(side)).items() if "proj" not in name}
    for name in (f"model.layers.{i}.mlp.up_proj" for i in range(2)):
        arrays[f"{name}.qweight"] = random.integers(-(2**31), 2**31, (side // 8, side), np.int32)
        arrays[f"{name}.qzeros"] = random.integers(-(2**31), 2**31, (side // 128, side // 8), np.int32)
        arrays[f"{name}.scales"] = (random.random((side // 128, side)) * 0.01).astype(np.float16)
        arrays[f"{name}.g_idx"] = (np.arange(side) // 128).astype(np.int32)
    quantised = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    return save(models.folder / f"gptq{seed}", arrays, config={**config(side), "quantization_config": quantised})


def written_as(output: Mapping[str, Any]) -> Callable[[Models], Command]:
    return lambda models: merge_of({**recipe("linear", models.tuned), "output": output}, models.folder)


def union(models: Models) -> Command:
    """Vocabularies of 50 words for each row of a matrix, half of which the models share."""
    count, paths = 50 * models.side, []
    for seed in range(2):
        tokens = ["<unk>", "<s>", "</s>", *(f"w{i + seed * count // 2}" for i in range(count))]
        arrays = {**weights(64), "model.embed_tokens.weight": np.zeros((len(tokens), 64), np.float32) + seed}
        paths.append(
            save(models.folder / f"words{seed}", bf16(arrays), config={**config(64), "vocab_size": len(tokens)})
        )
        (Path(paths[-1]) / "tokenizer.json").write_text(json.dumps(tokenizer(tokens)))
    return merge_of({**recipe("linear", paths), "tokenizer": {"source": "union"}}, models.folder)


def extraction(models: Models) -> Command:
    return "lora", "extract", "--rank=16", models.base, models.tuned[0]


def adapters(models: Models) -> Command:
    """The sum of adapters of high rank."""
    modules = {f"model.layers.{i}.mlp.up_proj": (models.side, models.side) for i in range(2)}
    return (
        "lora",
        "merge",
        *(save_adapter(models.folder / f"a{i}", factors(models.side // 8, i, modules)) for i in range(3)),
    )


def converted(*options: str) -> Callable[[Models], Command]:
    return lambda models: ("convert", *options, models.base)


#: Kind -> the command that it is measured with.
KINDS: dict[str, Callable[[Models], Command]] = {
    "of base and adapter": adapted, "of GGUF": gguf, "of GPTQ": gptq,
    "to FP8, by blocks": written_as({"dtype": "fp8_block"}), "to FP8, by tensors": written_as({"dtype": "fp8_tensor"}),
    "to GGUF": written_as({"format": "gguf", "dtype": "q8_0"}), "union of vocabularies": union,
    "lora extract": extraction, "lora merge": adapters, "convert": converted("--dtype=float16"),
    "convert to GGUF": converted("--format=gguf", "--dtype=q8_0"), "convert to FP8": converted("--dtype=fp8_tensor"),
}  # fmt: skip


def of_kinds(names: list[str], threads: list[int], side: int, home: Path) -> Iterator[Row]:
    for place, name in enumerate(names):
        commands = [KINDS[name](Models.make(home / f"kind{place}-{each}", each)) for each in (256, side)]
        idle = idle_of(commands[0], home / "out")
        for count in threads:
            yield measured(name, commands[1], count, idle, home / "out")


def main() -> int:
    parser = argparse.ArgumentParser(description="does everything keep to its --memory?")
    parser.add_argument("names", nargs="*", metavar="METHOD|KIND", help="by default all")
    parser.add_argument("--threads", default="1,2,4", help="comma-separated")
    parser.add_argument("--sides", default="2048,1024", help="of the matrices: for methods of elements, of matrices")
    given = parser.parse_args()
    names = given.names or [*smelt.methods.names(), *KINDS]
    threads, (first, second) = [int(n) for n in given.threads.split(",")], map(int, given.sides.split(","))
    print("| what | threads | idle, MiB | least budget | more | taken | taken | taken / budget | problems |")
    print("|" + " --- |" * 9)
    bad = False
    with tempfile.TemporaryDirectory() as home:
        methods, kinds = [name for name in names if name not in KINDS], [name for name in names if name in KINDS]
        place = Path(home)
        for row in chain(of_methods(methods, threads, (first, second), place), of_kinds(kinds, threads, first, place)):
            print(row, flush=True)
            bad |= row.is_bad
    return int(bad)


if __name__ == "__main__":
    raise SystemExit(main())

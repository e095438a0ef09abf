"""Does every method keep to the memory that it plans? ``python -m tests.memory BASE MODEL,... [METHOD]...`` tells.

It prints a table of merges of these models, each with the least that its method needs. Every merge runs in a process of
its own, when its functions are compiled; measured is the largest resident set, mapped files included. The exit code
is 1 when a merge takes over 15 % more than its plan says.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import smelt
from smelt.methods import Method
from tests.given import save_statistics, statistics_for
from tests.recipes import make_family, recipe
from tests.test_every_method import has_base, required

#: Of the plan.
ALLOWED = 1.15

MERGE = """
import json, re, sys, smelt
tree, out = json.load(open(sys.argv[1])), sys.argv[2]
plan = smelt.plan(tree, threads=2, memory="64GiB")
planned = plan.peak_memory
plan.close()
smelt.merge(tree, out, threads=2, memory="64GiB", force=True)
# The kernel's other figure, ru_maxrss, begins at what the process that forked had.
print(planned, int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


def tree_of(method: Method, variant: str, models: list[str], base: str, folder: Path) -> dict[str, Any]:
    """The least that the method needs, statistics among it."""
    chosen = required(method, variant)
    each = {p.name: chosen[p.name] for p in method.parameters if p.per_model and p.name in chosen}
    shared = {name: value for name, value in chosen.items() if name not in each}
    count = method.max_models or len(models)
    known = base if has_base(method) else None
    tree = recipe(method.name, models[:count], known, each=each, parameters=shared)
    if method.statistics:
        given = statistics_for(method, chosen, [dict(smelt.load(model)) for model in models[:count]])
        for index, entry in enumerate(tree["models"][: len(given)] if any(given) else ()):
            entry["statistics"] = save_statistics(folder / f"{len(models[index])}-{index}.safetensors", given[index])
    return tree


def merged(tree: dict[str, Any]) -> tuple[int, int] | str:
    """(planned, measured) bytes, or why not."""
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "recipe.json"
        path.write_text(json.dumps(tree))
        command = [sys.executable, "-c", MERGE, str(path), f"{home}/out"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return done.stderr.strip().splitlines()[-1]
        planned, measured = map(int, done.stdout.split())
        return planned, measured


def rows(models: list[str], base: str, wanted: list[str]) -> Iterator[tuple[str, tuple[int, int] | str]]:
    """Method and variant, with what became of it."""
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "small").mkdir()
        small = make_family(Path(home) / "small")
        for method in map(smelt.methods.get, wanted):
            for variant in method.variants:
                merged(tree_of(method, variant, list(small.models), small.base, Path(home)))  # compiles
                name = f"{method.name} ({variant})" if len(method.variants) > 1 else method.name
                yield name, merged(tree_of(method, variant, models, base, Path(home)))


def main(arguments: list[str]) -> int:
    base, models, wanted = arguments[0], arguments[1].split(","), arguments[2:] or smelt.methods.names()
    print("| method | planned, MiB | measured, MiB | measured / planned |\n| --- | --- | --- | --- |")
    worst = 0.0
    for name, found in rows(models, base, wanted):
        if isinstance(found, str):
            print(f"| {name} | {found} | | |", flush=True)
            continue
        worst = max(worst, found[1] / found[0])
        planned, measured = (value >> 20 for value in found)
        print(f"| {name} | {planned} | {measured} | {found[1] / found[0]:.2f} |", flush=True)
    return int(worst > ALLOWED)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

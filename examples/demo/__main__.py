"""Trains a base and four experts, merges them with smelt, and tells whether a merge beats every single one.

The exit code is 0 only if it does.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import commands, page
from .corpus import Domain, load_domains
from .evaluate import evaluate, prepare
from .folder import open_folder
from .model import load, load_tokenizer, make_reproducible, save, train_tokenizer
from .results import Kind, Result, judge, show
from .train import encode, train_base, train_expert


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the whole demo; returns its exit code."""
    options = parse(arguments)
    folder: Path = options.out
    started = time.monotonic()
    try:
        open_folder(folder, options.fresh)
        make_reproducible()
        with stage("Collecting text from this Python installation"):
            domains = load_domains()
        train_models(folder, domains)
        diagnosis = diagnose(folder, domains)
        merges = merge_all(folder)
    except FileExistsError as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as failure:
        print(f"error: smelt ended with exit code {failure.returncode}", file=sys.stderr)
        return 1
    with stage("Evaluating every model on held-out text"):
        results = evaluate_all(folder, domains, merges)
    verdict = judge(results)
    report = folder / "index.html"
    recipes = {name: (folder / "recipes" / f"{name}.yml").read_text() for name in merges}
    report.write_text(page.render(results, domains, verdict, diagnosis, recipes), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    show(results, domains)
    print(f"{verdict}\n{report} has the plots. {time.monotonic() - started:.0f} s in all.")
    return 0 if verdict.holds else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="default: %(default)s")
    parser.add_argument("--fresh", action="store_true", help="train again, even if trained models are there")
    return parser.parse_args(arguments)


def train_models(folder: Path, domains: Sequence[Domain]) -> None:
    """Trains what is missing of models/base and of one expert for each domain."""
    names = ["base", *(domain.name for domain in domains)]
    missing = [name for name in names if not (folder / "models" / name).exists()]
    if missing != names:
        kept = ", ".join(name for name in names if name not in missing)
        print(f"Models already trained: {kept} (--fresh trains again)", flush=True)
    if not missing:
        return
    base = folder / "models" / "base"
    if "base" in missing:
        with stage("Training a tokenizer"):
            tokenizer = train_tokenizer([domain.train[:400_000] for domain in domains])
    else:
        tokenizer = load_tokenizer(base)
    with stage("Encoding the text"):
        corpus = encode(domains, tokenizer)
    if "base" in missing:
        with stage("Training the base"):
            save(train_base(corpus), tokenizer, base)
    for seed, domain in enumerate(domains, start=10):
        if domain.name in missing:
            with stage(f"Fine-tuning the expert {domain.name}: {domain.title}"):
                expert = train_expert(load(base), domain.name, corpus, seed)
                save(expert, tokenizer, folder / "models" / domain.name)


def diagnose(folder: Path, domains: Sequence[Domain]) -> dict[str, Any]:
    """Asks `smelt check` about the experts, and keeps the recipe that it proposes as recipes/advised.yml."""
    with stage("Checking with smelt"):
        experts = [f"models/{domain.name}" for domain in domains]
        diagnosis = commands.check(folder, experts, "models/base")
        for finding in diagnosis["findings"]:
            print(f"  {finding['severity']}: {finding['message']}")
        if diagnosis["advice"]:
            (folder / "recipes" / "advised.yml").write_text(diagnosis["advice"]["recipe"], encoding="utf-8")
    return diagnosis


def merge_all(folder: Path) -> list[str]:
    """Runs every recipe of the folder; returns the names of the merges."""
    names = sorted(path.stem for path in (folder / "recipes").glob("*.yml"))
    with stage("Merging with smelt"):
        for name in names:
            commands.merge(folder, f"recipes/{name}.yml", f"merges/{name}")
        print(commands.smelt(folder, "inspect", f"merges/{names[0]}"))
    return names


def evaluate_all(folder: Path, domains: Sequence[Domain], merges: Sequence[str]) -> list[Result]:
    """Scores the base, the experts and the merges, each with the tokenizer in its own folder."""
    experts = [domain.name for domain in domains]
    models: list[tuple[str, Kind, Path]] = [("base", "base", folder / "models" / "base")]
    models += [(name, "expert", folder / "models" / name) for name in experts]
    models += [(name, "merge", folder / "merges" / name) for name in merges]
    return [evaluate_model(name, kind, path, domains) for name, kind, path in models]


def evaluate_model(name: str, kind: Kind, path: Path, domains: Sequence[Domain]) -> Result:
    model, tokenizer = load(path), load_tokenizer(path)
    return Result(name, kind, {domain.name: evaluate(model, prepare(domain, tokenizer)) for domain in domains})


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Says what begins, and how long it took."""
    print(f"{what} ...", flush=True)
    started = time.monotonic()
    yield
    print(f"  {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())

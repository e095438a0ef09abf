"""Run mergekit's recipes and compare with what mergekit wrote: `python -m tests.mergekit_parity DIR`.

DIR holds ``models/`` and ``cases/<id>/`` (``config.yaml``, ``case.json``, expected tensors). A case that uses
what a later version brings is reported as ``not yet: reason`` and counted apart. Exit status 0 only when no
case failed.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import smelt
from smelt.engine.layout import natural_key
from tests.mergekit_programs import PROGRAMS, comparable, run

Arrays = dict[str, Any]
HERE = Path(__file__).parent / "mergekit_cases"

#: Programs of mergekit that later versions bring.
LATER_ENTRIES = {"mergekit-moe"}

#: Flags of mergekit's programs as options of ours.
OPTIONS: dict[str, dict[str, Any]] = {
    "mergekit-pytorch": {"raw": True}, "-u": {"on_extra": "merge"},
    "--unsafe-truncate-embeddings": {"truncate_embeddings": True}, "--lazy-unpickle": {"allow_pickle": True},
}  # fmt: skip
EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}


class Mismatch(Exception):
    """The case came out wrong: the message says how."""


class NotYet(Exception):
    """The case needs what a later version brings."""


def run_case(folder: Path, root: Path) -> None:
    """Run one case. Raises Mismatch or NotYet."""
    case = json.loads((folder / "case.json").read_text())
    _refuse_later(case)
    wanted_error = case["expected"] == "error" and not case.get("defect")
    try:
        result = merged(case, folder, root)
    except smelt.SmeltError as error:
        reason = _later_reason(str(error))
        if reason:
            raise NotYet(reason) from error
        if not wanted_error:
            raise Mismatch(f"refused: {error}") from error
        return
    if wanted_error:
        raise Mismatch("accepted what must be refused")
    compare_with_any(result, case, folder)


def _refuse_later(case: dict[str, Any]) -> None:
    if case["entry"] in LATER_ENTRIES:
        raise NotYet(f"the job of {case['entry']}")


def _later_reason(message: str) -> str | None:
    if "not executed by this version" in message:
        first = message.splitlines()[0].partition(": ")[2]
        return first.removesuffix(" is understood but not executed by this version")
    return None


def merged(case: dict[str, Any], folder: Path, root: Path) -> Arrays:
    """The merged tensors, through the front door that the case needs."""
    with contextlib.chdir(root / case["cwd"]):
        if case.get("random"):
            return _with_recorded_masks(folder)
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "OUT"
            if case["entry"] in PROGRAMS:
                result = run(case["argv"], out)
                _check_published(out)
                return result
            options = {key: value for word in case["argv"] for key, value in OPTIONS.get(word, {}).items()}
            smelt.merge(folder.resolve() / "config.yaml", out, models=_in_memory(case, folder), **options)
            _check_published(out)
            with smelt.load(out) as checkpoint:
                result = {name: checkpoint[name] for name in checkpoint}
            return in_expected_rows(result, out, folder, case)


def _in_memory(case: dict[str, Any], folder: Path) -> dict[str, Arrays]:
    """Models that are handed over in the layout in which mergekit merges them, by name.

    smelt keeps the layout of the files; merging fused experts gives other numbers where a method ranks the
    elements of a tensor, so that only the same layout can be compared.
    """
    if "fused" not in case["title"]:
        return {}
    recipe = yaml.safe_load((folder / "config.yaml").read_text())
    names = [recipe["base_model"], *(entry["model"] for entry in recipe["models"])]
    return {name: with_fused_experts(name) for name in names}


def _check_published(out: Path) -> None:
    report = smelt.verify(out)
    if not report.ok:
        raise Mismatch(f"the published folder does not verify: {report.problems[0]}")


def in_expected_rows(result: Arrays, out: Path, folder: Path, case: dict[str, Any]) -> Arrays:
    """The rows of embedding and head by the expected ids, where those are arbitrary; else ids must agree."""
    if not (folder / "expected_vocab.json").exists():
        return result
    wanted = json.loads((folder / "expected_vocab.json").read_text())
    vocabulary = tokens_of(out)
    arbitrary = "compare_by_token" in case
    if vocabulary.keys() != wanted.keys() or (vocabulary != wanted and not arbitrary):
        raise Mismatch(f"tokens differ: {sorted(vocabulary.items() ^ wanted.items())[:4]}")
    rows = list(range(len(result["model.embed_tokens.weight"])))
    for token, index in wanted.items():
        rows[index] = vocabulary[token]
    return {name: array[rows] if name in EMBEDDINGS else array for name, array in result.items()}


def tokens_of(folder: Path) -> dict[str, int]:
    """Token -> id, as the written tokenizer states it."""
    tree = json.loads((folder / "tokenizer.json").read_text())
    return {**tree["model"]["vocab"], **{entry["content"]: entry["id"] for entry in tree["added_tokens"]}}


def _with_recorded_masks(folder: Path) -> Arrays:
    """The same recipe in memory, with the draws that mergekit made."""
    recipe = yaml.safe_load((folder / "config.yaml").read_text())
    entries = [entry for entry in recipe["models"] if entry["model"] != recipe["base_model"]]
    draws = smelt.load(folder.resolve() / "draws.safetensors")
    masks = [
        {name.split("/", 2)[2]: draws[name] for name in draws if name.startswith(f"mask/{index}/")}
        for index in range(len(entries))
    ]
    common = recipe.get("parameters", {})
    names = sorted({name for entry in entries for name in entry["parameters"]})
    return smelt.merge_tensors(
        recipe["merge_method"],
        [dict(smelt.load(entry["model"])) for entry in entries],
        dict(smelt.load(recipe["base_model"])),
        parameters={**common, "variant": "mergekit"},
        per_model={name: [{**common, **entry["parameters"]}[name] for entry in entries] for name in names},
        masks=masks,
    )


def compare_with_any(result: Arrays, case: dict[str, Any], folder: Path) -> None:
    """Agreement with one of the expectations is enough."""
    files = ["expected_correct.safetensors"] if case.get("defect") else ["expected.safetensors"]
    if case.get("low_precision"):
        files.append("expected_float32_compute.safetensors")
    failures = []
    for file in files:
        try:
            compare(comparable(result), comparable(dict(smelt.load(folder / file))), case["tolerance"])
            return
        except Mismatch as mismatch:
            failures.append(f"{file}: {mismatch}")
    raise Mismatch("; ".join(failures))


def compare(result: Arrays, expected: Arrays, tolerance: dict[str, Any]) -> None:
    """Same names, shapes, dtypes; |a - b| <= atol + rtol |b| for all elements, or all but a stated share."""
    if set(result) != set(expected):
        raise Mismatch(f"names differ: {sorted(set(result) ^ set(expected))[:4]}")
    outside = total = 0
    worst = ("", 0.0)
    for name, wanted in expected.items():
        got = result[name]
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            raise Mismatch(f"{name}: {got.dtype}{got.shape}, expected {wanted.dtype}{wanted.shape}")
        a, b = got.astype(np.float64), wanted.astype(np.float64)
        bad = ~(np.abs(a - b) <= tolerance["atol"] + tolerance["rtol"] * np.abs(b))
        outside, total = outside + int(bad.sum()), total + bad.size
        if bad.any() and np.abs(a - b).max() > worst[1]:
            worst = (name, float(np.abs(a - b).max()))
    if outside > tolerance.get("max_fraction_outside", 0) * total:
        raise Mismatch(f"{outside} of {total} elements differ, most {worst[1]:.3g} in {worst[0]}")


def with_fused_experts(model: str) -> Arrays:
    """A Mixtral with its experts as they are in memory, which is how mergekit merges and writes them."""
    single = re.compile(r"(.+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
    stored = dict(smelt.load(model))
    experts: dict[str, dict[str, list[Any]]] = {}
    fused: Arrays = {}
    for name in sorted(stored, key=natural_key):
        if match := single.fullmatch(name):
            experts.setdefault(match[1], {}).setdefault(match[3], []).append(stored[name])
        else:
            fused[name.replace(".block_sparse_moe.", ".mlp.")] = stored[name]
    for layer, parts in experts.items():
        pairs = zip(parts["w1"], parts["w3"], strict=True)
        fused[f"{layer}.mlp.experts.gate_up_proj"] = np.stack([np.concatenate(pair) for pair in pairs])
        fused[f"{layer}.mlp.experts.down_proj"] = np.stack(parts["w2"])
    return fused


def cases_in(root: Path) -> Iterator[Path]:
    if not (root / "cases").is_dir():
        raise SystemExit(f"{root} has no cases folder")
    yield from sorted(path.parent for path in (root / "cases").glob("*/case.json"))


def main(arguments: list[str]) -> int:
    root = Path(arguments[0] if arguments else HERE).resolve()
    counts: Counter[str] = Counter()
    for folder in cases_in(root):
        try:
            run_case(folder, root)
            counts["passed"] += 1
        except NotYet as reason:
            counts["not yet"] += 1
            print(f"{folder.name}: not yet: {reason}")
        except Mismatch as mismatch:
            counts["failed"] += 1
            print(f"FAILED {folder.name}: {mismatch}")
    print(f"{counts['not yet']} not yet")
    print(f"{counts['passed']} passed, {counts['failed']} failed")
    return 1 if counts["failed"] or not counts["passed"] else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

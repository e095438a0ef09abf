"""Mutated files of every kind that is read: refused with an error that was meant, or read as others read them.

``python -m tests.fuzz RUNS [SEED]`` runs each target so often, from the corpus of bad inputs and a few good ones.
A header that smelt accepts must be accepted by the reference implementation, too.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors

import smelt
from smelt.checkpoint.adapter import read_adapter
from smelt.engine.verification import read_manifest
from smelt.errors import SmeltError
from smelt.recipe import parse
from tests import adapter_attacks, gguf_attacks, pickle_attacks, quantised_attacks
from tests.attacks import ATTACKS, FILE, INDEX, ONE, PAIR, TWO, good, put

#: No input may take longer, in seconds.
PATIENCE = 1.0

#: What is put in: marks of the formats, numbers at the edges, names that mean something.
WORDS = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"0", b"1e999", b"null", b"true", b"9223372036854775808",
         b'"dtype"', b'"shape"', b'"data_offsets"', b'"F32"', b'"F4"', b"../", b"\\u0000", b"\xff", b"\n", b"- ", b"!!",
         b"&a ", b"*a", b"<<: ", b"models:", b"'", b"|", b"---\n"]  # fmt: skip

RECIPES = [
    b"merge_method: ties\nbase_model: a\nmodels:\n- model: b\n  parameters: {weight: [0, 1]}\n- {model: c}\n",
    b"merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 4]}]\ndtype: bfloat16\n",
    b"name: one\nmerge_method: linear\nmodels: [{model: &x a}, {model: *x}]\n---\nmerge_method: slerp\nmodels: []\n",
]


def mutated(seed: bytes, luck: random.Random) -> bytes:
    """A few small changes: bits, words, pieces that are taken out, doubled or moved."""
    data = bytearray(seed)
    for _ in range(luck.randint(1, 4)):
        at = luck.randint(0, len(data))
        end = min(len(data), at + luck.randint(1, 20))
        kind = luck.randrange(5)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << luck.randrange(8)
        elif kind == 1:
            data[at:at] = luck.choice(WORDS)
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end]
        else:
            data[at:end] = luck.choice(WORDS)
    return bytes(data)


def header(content: bytes, folder: Path) -> str:
    with smelt.load(put(folder, content)) as checkpoint:
        names = set(checkpoint.tensors)
    assert {name for name, _ in safetensors.deserialize(content)} == names
    return "accepted, as the reference does"


def index(content: bytes, folder: Path) -> str:
    smelt.load(put(folder, content, INDEX).parent).close()
    return "accepted"


def manifest(content: bytes, folder: Path) -> str:
    read_manifest(put(folder, content, "smelt-manifest.json").parent)
    return "accepted"


def recipe(content: bytes, folder: Path) -> str:
    parse(content.decode("utf-8", "replace"), "recipe.yml")
    return "accepted"


def gguf(content: bytes, folder: Path) -> str:
    return everything(smelt.load(put(folder, content, "m.gguf")))


def pickle(content: bytes, folder: Path) -> str:
    return everything(smelt.load(put(folder, content, "m.pt"), allow_pickle=True))


def adapter(content: bytes, folder: Path) -> str:
    """Its config, beside factors of one module."""
    adapter_attacks.put(folder, adapter_attacks.FACTORS, {})
    put(folder, content, "adapter_config.json")
    with read_adapter(folder).file:
        return "accepted"


def quantised(content: bytes, folder: Path) -> str:
    """The config of a checkpoint whose tensors are of the scheme that it names."""
    stored = next((stored for name, (stored, _) in SCHEMES.items() if name in content), {})
    quantised_attacks.written(folder, stored, {})
    put(folder, content, "config.json")
    return everything(smelt.load(folder))


def state(content: bytes, folder: Path) -> str:
    """What bitsandbytes says of a tensor, in a tensor."""
    stored = quantised_attacks.nf4()
    stored[next(name for name in stored if "quant_state" in name)] = np.frombuffer(content, np.uint8)
    return everything(smelt.load(quantised_attacks.written(folder, stored, quantised_attacks.NF4)))


def everything(checkpoint: smelt.Checkpoint) -> str:
    """Read all of it."""
    with checkpoint:
        for name in checkpoint:
            checkpoint[name]
    return "accepted"


SCHEMES = {
    b"fp8": (quantised_attacks.fp8(), quantised_attacks.BLOCK),
    b"gptq": (quantised_attacks.gptq(), quantised_attacks.GPTQ),
    b"compressed": (quantised_attacks.packed(), quantised_attacks.PACKED),
    b"mxfp4": (quantised_attacks.EXPERTS, quantised_attacks.MXFP4),
    b"bitsandbytes": (quantised_attacks.nf4(), quantised_attacks.NF4),
}
ADAPTERS = [
    {**adapter_attacks.CONFIG, "rank_pattern": {"layers.0.q": 2}, "alpha_pattern": {".*q": 8}, "use_rslora": True},
    {**adapter_attacks.CONFIG, "target_modules": ["q"], "modules_to_save": None, "bias": "none", "use_dora": False},
]


def formats() -> dict[Callable[[bytes, Path], str], list[bytes]]:
    """The same for other formats than safetensors."""
    bits = next(array for name, array in quantised_attacks.nf4().items() if "quant_state" in name)
    return {
        gguf: [gguf_attacks.file()] * 20 + [content for content, _ in gguf_attacks.BAD.values()],
        pickle: [pickle_attacks.plain()],
        adapter: [json.dumps(config).encode() for config in ADAPTERS],
        quantised: [json.dumps({"quantization_config": config}).encode() for _, config in SCHEMES.values()],
        state: [bits.tobytes()],
    }


def corpus(folder: Path) -> dict[Callable[[bytes, Path], str], list[bytes]]:
    """The targets with what is mutated for each: small files of the bad inputs, and good ones."""
    found: dict[str, list[bytes]] = {FILE: [good("a"), good("a", "b", "c")], INDEX: []}
    for attack in ATTACKS:
        if attack.name.startswith(("A40", "A35", "A34", "A07", "B43-index-large", "B60")):
            continue
        with tempfile.TemporaryDirectory(dir=folder) as home:
            attack.make(Path(home))
            for name, seeds in found.items():
                path = Path(home) / name
                seeds += [path.read_bytes()] if path.is_file() and path.stat().st_size < 10_000 else []
    found[INDEX].append(json.dumps({"metadata": {}, "weight_map": {"a": ONE, "b": TWO}}).encode())
    told = {"format": 1, "tensors": {"a": {"dtype": "F32", "shape": [2], "sha256": "0"}}, "files": {"b": "1"}}
    found[FILE] += found[FILE][:2] * 50  # changes of good files find what is accepted wrongly
    found[INDEX] += found[INDEX][-1:] * 20
    return {header: found[FILE], index: found[INDEX], manifest: [json.dumps(told).encode()], recipe: RECIPES,
            **formats()}  # fmt: skip


def fuzz(runs: int, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """How often what happened, and what must not."""
    luck, counts, problems = random.Random(seed), Counter[str](), []
    for name, content in PAIR.items():
        put(folder, content, name)
    for target, seeds in corpus(folder).items():
        for stale in (FILE, INDEX):
            (folder / stale).unlink(missing_ok=True)
        home = folder if target is index else Path(tempfile.mkdtemp(dir=folder))
        with contextlib.suppress(SmeltError):
            target(seeds[0], home)  # what is compiled is not timed
        for _ in range(runs):
            content = mutated(luck.choice(seeds), luck)
            began = time.monotonic()
            try:
                counts[f"{target.__name__}: {target(content, home)}"] += 1
            except SmeltError:
                counts[f"{target.__name__}: refused"] += 1
            except Exception as error:  # any other is what is looked for
                problems.append(f"{target.__name__}: {error!r}: {content!r}")
            if time.monotonic() - began > PATIENCE:
                problems.append(f"{target.__name__}: {time.monotonic() - began:.1f} s: {content!r}")
    return counts, problems


def main(arguments: list[str]) -> int:
    runs, seed = int(arguments[0]) if arguments else 100_000, int(arguments[1]) if arguments[1:] else 0
    with tempfile.TemporaryDirectory() as folder:
        counts, problems = fuzz(runs, seed, Path(folder))
    print(*(f"{count:8} {what}" for what, count in sorted(counts.items())), *problems[:20], sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

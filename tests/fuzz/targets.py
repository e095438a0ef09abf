"""What reads the mutated files, and the files that are mutated: those of the bad inputs, and good ones.

A target takes the bytes of a file and a folder of its own, and tells in words that they were accepted.
"""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save

import smelt
from smelt.checkpoint.adapter import read_adapter
from smelt.recipe import parse
from tests import adapter_attacks, gguf_attacks, pickle_attacks, quantised_attacks
from tests.attacks import ATTACKS, FILE, INDEX, ONE, PAIR, TWO, good, put
from tests.fuzz.mutations import HEADER, JSON, YAML, Form
from tests.fuzz.trial import Target
from tests.gguf_files import LLAMA
from tests.pickled import pickled
from tests.vocabularies import tokenizer

#: The reference's names of what it reads.
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

RECIPES = [
    b"merge_method: ties\nbase_model: a\nmodels:\n- model: b\n  parameters: {weight: [0, 1]}\n"
    b"- {model: c, parameters: {weight: 1}}\n",
    b"merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 2]}]\ndtype: bfloat16\n",
    b"name: one\nmerge_method: linear\nmodels: [{model: &x a}, {model: *x}]\n---\nmerge_method: slerp\nmodels: []\n",
    b"merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters:\n  t:\n  - filter: mlp\n"
    b"    value: [0, 0.5, 1]\n  - value: 0.5\nout_dtype: float16\nseed: 7\n",
    b"merge_method: dare_ties\nbase_model: a\nmodels:\n- model: b\n  parameters: {density: 0.5, weight: 1}\n"
    b"tokenizer_source: base\nchat_template: auto\n",
    b"slices:\n- sources:\n  - {model: a, layer_range: [0, 2]}\n  - {model: b, layer_range: [0, 2]}\n"
    b"merge_method: linear\nparameters: {weight: 0.5, normalize: true}\n",
    b"name: x\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n---\n"
    b"merge_method: task_arithmetic\nbase_model: c\nmodels: [{model: x, parameters: {weight: 0.3}}]\n",
    b"merge_method: linear\nmodels: [{model: a}, {model: b}]\nonly: [mlp, self_attn]\nparameters: {weight:\n"
    b"  [{filter: mlp, value: 0.1}, {filter: '*', value: [0, 1]}, {value: 2.0}]}\noutput: {format: safetensors}\n",
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A target, what is mutated for it, and the form of that where it has values in each other."""

    target: Target
    seeds: Callable[[], list[bytes]]
    form: Form | None = None


# --- safetensors, indices, manifests --------------------------------------------------------------------


def header(content: bytes, folder: Path) -> str:
    """What smelt accepts, the reference accepts, with the same names, types and shapes."""
    with smelt.load(put(folder, content)) as checkpoint:
        ours = {name: (info.dtype, list(info.shape)) for name, info in checkpoint.tensors.items()}
    theirs = {name: (told["dtype"], told["shape"]) for name, told in safetensors.deserialize(content)}
    assert {name: shape for name, (_, shape) in ours.items()} == {name: shape for name, (_, shape) in theirs.items()}
    assert all(theirs[name][0] == dtype for name, (dtype, _) in ours.items() if dtype in _BYTES)
    return "accepted, as the reference does"


def index(content: bytes, folder: Path) -> str:
    for name, shard in PAIR.items():
        put(folder, shard, name)
    smelt.load(put(folder, content, INDEX).parent).close()
    return "accepted"


def manifest(content: bytes, folder: Path) -> str:
    """Beside what it is of: only the true one is right."""
    out = put(_merged(folder), content, "smelt-manifest.json").parent
    return "accepted" if smelt.verify(out).ok else "refused"


def reproduction(content: bytes, folder: Path) -> str:
    """The recipe and options in it are carried out again."""
    out = put(_merged(folder), content, "smelt-manifest.json").parent
    return "accepted" if smelt.reproduce(out, folder, threads=1).ok else "refused"


@cache
def _merged(folder: Path) -> Path:
    tuned = _folders(folder, "a", "b")
    for home in tuned:
        put(home, good("w", "x"))
    tree = {"merge_method": "linear", "parameters": {"weight": 1}, "models": [{"model": str(home)} for home in tuned]}
    return smelt.merge(tree, folder / "out", threads=1, force=True).path


@cache
def _attacked(name: str) -> list[bytes]:
    """The files of this name among the bad inputs, where they are small."""
    found = []
    for attack in ATTACKS:
        if attack.name.startswith(("A40", "A35", "A34", "A07", "B43-index-large", "B60")):
            continue
        with tempfile.TemporaryDirectory() as home:
            attack.make(Path(home))
            path = Path(home) / name
            found += [path.read_bytes()] if path.is_file() and path.stat().st_size < 10_000 else []
    return found


def _headers() -> list[bytes]:
    """Changes of good files find what is accepted wrongly, so that these are many."""
    arrays = {"a": np.ones((2, 3), np.float16), "b.c": np.zeros((), np.int64), "d": np.ones((0, 2), np.uint8)}
    rich = save(arrays, {"format": "pt", "x": "é"})
    return [good("a"), good("a", "b", "c"), rich] * 30 + _attacked(FILE)


def _indices() -> list[bytes]:
    whole = {"metadata": {"total_size": 16}, "weight_map": {"a": ONE, "b": TWO}}
    return [json.dumps(whole).encode()] * 20 + _attacked(INDEX)


def _manifests() -> list[bytes]:
    with tempfile.TemporaryDirectory() as home:
        return [(_merged(Path(home)) / "smelt-manifest.json").read_bytes()]


# --- recipes and configs --------------------------------------------------------------------------------


def recipe(content: bytes, folder: Path) -> str:
    parse(content.decode("utf-8", "replace"), "recipe.yml")
    return "accepted"


def plan(content: bytes, folder: Path) -> str:
    """A recipe of models that are there, up to the first read of a weight."""
    parsed = parse(content.decode("utf-8", "replace"), "recipe.yml")
    named = {path for each in parsed for found in (each.references(), each.token_references())
             for reference in found for path in reference.paths}  # fmt: skip
    if not named <= {"a", "b", "c", *(each.name for each in parsed)}:
        return "of other models"
    models = {name: _opened(folder) for name in named & {"a", "b", "c"} - {each.name for each in parsed}}
    smelt.plan(parsed, models=models, threads=1, memory="256MiB").close()
    return "accepted"


@cache
def _opened(folder: Path) -> smelt.Checkpoint:
    """One of a few layers, that stays open."""
    (home,) = _folders(folder, "model")
    put(home, save(_model(), {"format": "pt"}))
    put(home, _configs()[0], "config.json")
    return smelt.load(home)


@cache
def _model() -> dict[str, Any]:
    parts = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    layers = {f"model.layers.{layer}.{part}.weight": np.ones((4, 4), np.float32) for layer in (0, 1) for part in parts}
    return {"model.embed_tokens.weight": np.ones((6, 4), np.float32), **layers, "model.norm.weight": np.ones(4)}


def tokens(content: bytes, folder: Path) -> str:
    """The tokenizer of one of two models whose vocabularies are aligned."""
    one, other = _folders(folder, "one", "other")
    for home, rows in ((one, 5), (other, 6)):
        arrays = {"model.embed_tokens.weight": np.ones((rows, 4), np.float32), "model.norm.weight": np.ones(4)}
        put(home, save(arrays, {"format": "pt"}))
        put(home, json.dumps({"model_type": "llama", "vocab_size": rows}).encode(), "config.json")
    put(one, _tokenizers()[0], "tokenizer.json")
    put(other, content, "tokenizer.json")
    tree = {"merge_method": "linear", "parameters": {"weight": 1}, "tokenizer": {"source": "union"},
            "models": [{"model": str(one)}, {"model": str(other)}]}  # fmt: skip
    smelt.plan(tree, threads=1, memory="256MiB").close()
    return "accepted"


def _tokenizers() -> list[bytes]:
    words = ["<unk>", "<s>", "</s>", "a", "b", "c"]
    pairs = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4}, "merges": ["a b", ["ab", "c"]]}
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.5]]}
    whole = [tokenizer(words[:5]), tokenizer(words)]
    return [json.dumps(each).encode() for each in (*whole, *({**whole[1], "model": m} for m in (pairs, unigram)))]


def config(content: bytes, folder: Path) -> str:
    """The config of a model, as far as a merge looks at it."""
    homes = _folders(folder, "one", "other")
    for home in homes:
        put(home, save(_model(), {"format": "pt"}))
        put(home, content, "config.json")
    tree = {"merge_method": "linear", "parameters": {"weight": 1}, "models": [{"model": str(home)} for home in homes]}
    smelt.plan(tree, threads=1, memory="256MiB").close()
    return "accepted"


def _folders(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).mkdir(exist_ok=True)
    return [folder / name for name in names]


def _configs() -> list[bytes]:
    llama = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4, "intermediate_size": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 6, "head_dim": 2,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "torch_dtype": "float32",
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "layer_types": ["full_attention", "sliding_attention"],
    }  # fmt: skip
    other = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 4}
    nested = {"model_type": "llava", "text_config": llama, "vision_config": {"num_hidden_layers": 1}}
    return [json.dumps(each).encode() for each in (llama, other, nested)]


# --- adapters -------------------------------------------------------------------------------------------


def adapter(content: bytes, folder: Path) -> str:
    """Its config, beside factors of one module."""
    adapter_attacks.put(folder, adapter_attacks.FACTORS, {})
    put(folder, content, "adapter_config.json")
    with read_adapter(folder).file:
        return "accepted"


def factors(content: bytes, folder: Path) -> str:
    """Its weights, in any of the layouts, on a base."""
    base, tuned = _folders(folder, "base", "adapter")
    put(base, save({"layers.0.q.weight": np.ones((6, 6), np.float32)}, {"format": "pt"}))
    (tuned / "adapter_config.json").write_text(json.dumps(adapter_attacks.CONFIG))
    alone = b"lora_unet" in content or b"unet." in content  # the layout of files that have no config
    path = put(tuned, content, "alone.safetensors" if alone else "adapter_model.safetensors")
    return everything(smelt.load(f"{base}+{path if alone else tuned}"))


ADAPTERS = [
    {**adapter_attacks.CONFIG, "rank_pattern": {"layers.0.q": 2}, "alpha_pattern": {".*q": 8}, "use_rslora": True},
    {**adapter_attacks.CONFIG, "target_modules": ["q"], "modules_to_save": None, "bias": "none", "use_dora": False},
    *({**adapter_attacks.CONFIG, "peft_type": kind} for kind in ("LOHA", "LOKR", "IA3", "OFT")),
]


def _factors() -> list[bytes]:
    a, b = (array for array in adapter_attacks.FACTORS.values())
    kohya = {"lora_unet_layers_0_q.lora_down.weight": a, "lora_unet_layers_0_q.lora_up.weight": b,
             "lora_unet_layers_0_q.alpha": np.array(2, np.float32)}  # fmt: skip
    bad = [tensors for _, tensors, _, _ in adapter_attacks.BAD]
    told = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 3})}
    diffusers = {f"unet.layers.0.q.lora_{part}.weight": array for part, array in (("A", a), ("B", b))}
    whole = [save(tensors) for tensors in (*[adapter_attacks.FACTORS] * 10, *[kohya] * 5, *bad)]
    return [*whole, save(diffusers, told), save(kohya, told)]


# --- GGUF, quantised checkpoints, pickles ---------------------------------------------------------------


def gguf(content: bytes, folder: Path) -> str:
    return everything(smelt.load(put(folder, content, "m.gguf")))


def _ggufs() -> list[bytes]:
    weight = {"blk.0.attn_q.weight": (0, (8, 32), bytes(1024)), "token_embd.weight": (8, (2, 32), bytes(68))}
    whole = [gguf_attacks.file(), gguf_attacks.file(metadata=LLAMA, tensors=weight)]
    return whole * 10 + [content for content, _ in gguf_attacks.BAD.values()]


def quantised(content: bytes, folder: Path) -> str:
    """The config of a checkpoint whose tensors are of the scheme that it names."""
    stored = next((stored for name, (stored, _) in SCHEMES.items() if name in content), {})
    quantised_attacks.written(folder, stored, {})
    put(folder, content, "config.json")
    return everything(smelt.load(folder))


def stored(content: bytes, folder: Path) -> str:
    """The tensors of a checkpoint whose config names the scheme that they are of."""
    scheme = next((config for name, config in MARKS.items() if name in content), {})
    (folder / "config.json").write_text(json.dumps({"quantization_config": scheme}))
    put(folder, content)
    return everything(smelt.load(folder))


def state(content: bytes, folder: Path) -> str:
    """What bitsandbytes says of a tensor, in a tensor."""
    tensors = quantised_attacks.nf4()
    tensors[next(name for name in tensors if "quant_state" in name)] = np.frombuffer(content, np.uint8)
    return everything(smelt.load(quantised_attacks.written(folder, tensors, quantised_attacks.NF4)))


SCHEMES = {
    b"fp8": (quantised_attacks.fp8(), quantised_attacks.BLOCK),
    b"gptq": (quantised_attacks.gptq(), quantised_attacks.GPTQ),
    b"compressed": (quantised_attacks.packed(), quantised_attacks.PACKED),
    b"mxfp4": (quantised_attacks.EXPERTS, quantised_attacks.MXFP4),
    b"bitsandbytes": (quantised_attacks.nf4(), quantised_attacks.NF4),
}
#: What is in the names of a scheme's tensors -> its config.
MARKS = {
    b"scale_inv": quantised_attacks.BLOCK, b"qweight": quantised_attacks.GPTQ, b"packed": quantised_attacks.PACKED,
    b"blocks": quantised_attacks.MXFP4, b"absmax": quantised_attacks.NF4,
}  # fmt: skip


def _quantised() -> list[bytes]:
    return [json.dumps({"quantization_config": told}).encode() for _, told in SCHEMES.values()]


def _stored() -> list[bytes]:
    return [save(tensors, {"format": "pt"}) for tensors, _ in SCHEMES.values()]


def _states() -> list[bytes]:
    tensors = quantised_attacks.nf4()
    return [next(array for name, array in tensors.items() if "quant_state" in name).tobytes()]


def archive(content: bytes, folder: Path) -> str:
    """The zip of a pickled model."""
    return everything(smelt.load(put(folder, content, "m.pt"), allow_pickle=True))


def pickle(content: bytes, folder: Path) -> str:
    """The instructions in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        made.writestr("archive/data.pkl", content)
        made.writestr("archive/data/0", pickle_attacks.DATA["data/0"])
    return archive(out.getvalue(), folder)


def _pickles() -> list[bytes]:
    bad = [pickled(instructions) for instructions, _ in pickle_attacks.CONTENTS.values()]
    return [pickled(pickle_attacks.ONE)] * 10 + [content for content in bad if len(content) < 10_000]


def everything(checkpoint: smelt.Checkpoint) -> str:
    """Read all of it."""
    with checkpoint:
        for name in checkpoint:
            checkpoint[name]
    return "accepted"


KINDS = {
    "header": Kind(header, _headers, HEADER),
    "index": Kind(index, _indices, JSON),
    "manifest": Kind(manifest, _manifests, JSON),
    "reproduction": Kind(reproduction, _manifests, JSON),
    "recipe": Kind(recipe, lambda: RECIPES, YAML),
    "plan": Kind(plan, lambda: RECIPES, YAML),
    "config": Kind(config, _configs, JSON),
    "tokens": Kind(tokens, _tokenizers, JSON),
    "adapter": Kind(adapter, lambda: [json.dumps(each).encode() for each in ADAPTERS], JSON),
    "factors": Kind(factors, _factors, HEADER),
    "gguf": Kind(gguf, _ggufs),
    "quantised": Kind(quantised, _quantised, JSON),
    "stored": Kind(stored, _stored, HEADER),
    "state": Kind(state, _states, JSON),
    "archive": Kind(archive, lambda: [pickle_attacks.plain()]),
    "pickle": Kind(pickle, _pickles),
}

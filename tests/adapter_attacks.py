"""Adapters that are wrong, or of another base: section E of the bad inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.attacks import FILE, Attack

A, B = "base_model.model.layers.0.q.lora_A.weight", "base_model.model.layers.0.q.lora_B.weight"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
FACTORS = {A: np.ones((2, 6), np.float32), B: np.ones((6, 2), np.float32)}
POOLS = {
    "pool.q.lora_A.weight": np.ones((4, 3), np.float32), "pool.q.lora_B.weight": np.ones((3, 4), np.float32),
}  # fmt: skip
CORE, FLORA = np.ones((6, 3), np.float32), {"peft_type": "FLORA", "scale": 1.0}
MOS = {
    "peft_type": "MOS", "r": 1, "lora_alpha": 2, "equivalent_rank": 1, "private_rank": 0, "shards_per_vector": 2,
}  # fmt: skip


def put(folder: Path, tensors: dict[str, Any], config: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


BAD: list[tuple[str, dict[str, Any], object, str]] = [
    ("E89-config-is-no-JSON", FACTORS, "{", "adapter_config.json.* is not valid JSON"),
    ("E89-config-is-a-list", FACTORS, "[]", "adapter_config.json.* holds .*, expected an object"),
    ("E90-another-kind", FACTORS, {"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING', .* known: LORA"),
    ("E90-no-kind", FACTORS, {"r": 2}, "peft_type is None"),
    ("E91-A-alone", {A: FACTORS[A]}, CONFIG, "lora_A.* is there, but .*lora_B.weight' is missing"),
    ("E92-another-rank", FACTORS, {**CONFIG, "r": 3}, r"lora_A.weight' is \[2, 6\], for rank 3"),
    ("E92-another-rank-by-pattern", FACTORS, {**CONFIG, "rank_pattern": {"q": 4}}, r"is \[2, 6\], for rank 4"),
    ("E92-factors-of-two-ranks", {**FACTORS, B: np.ones((6, 3), np.float32)}, CONFIG, r"is \[6, 3\], beside \[2, 6\]"),
    ("E94-DoRA-without-magnitudes", FACTORS, {**CONFIG, "use_dora": True}, "without lora_magnitude_vector.*use_dora"),
    (
        "E94-magnitudes-without-DoRA",
        {**FACTORS, A.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(6, np.float32)},
        CONFIG,
        "with lora_magnitude_vector, against use_dora",
    ),
    (
        "E97-endless-pattern",
        FACTORS,
        {**CONFIG, "rank_pattern": {"(a+)+b": 2}},
        r"rank_pattern: '\(a\+\)\+b' is too complex",
    ),
    ("E97-no-pattern", FACTORS, {**CONFIG, "alpha_pattern": {"(": 2}}, "is no regular expression"),
    ("E98-alpha-of-nothing", FACTORS, {**CONFIG, "lora_alpha": 0}, "lora_alpha of 'layers.0.q' is 0"),
    ("E98-alpha-is-NaN", FACTORS, '{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}', "lora_alpha of .* is nan"),
    ("E98-rank-of-nothing", FACTORS, {**CONFIG, "r": 0}, "the rank of 'layers.0.q' is 0, expected 1 or more"),
    ("E98-rank-is-text", FACTORS, {**CONFIG, "r": "2"}, "the rank of 'layers.0.q' is '2'"),
    ("E-an-unknown-tensor", {**FACTORS, "x.y": FACTORS[A]}, CONFIG, "tensor 'x.y' is not understood"),
    ("E-one-name-in-two-ways", {**FACTORS, A.removeprefix("base_model.model."): FACTORS[A]}, CONFIG,
     "lora_A.weight' is not understood beside"),
    ("E-one-tensor-stored-twice", {"x.bias": FACTORS[A], "x.base_layer.bias": FACTORS[A]}, {**CONFIG, "bias": "all"},
     "'x.bias' is stored 2 times"),
    ("E-an-embedding-and-a-matrix-at-once", {**FACTORS, A.replace("A.weight", "embedding_A"): FACTORS[A],
     A.replace("A.weight", "embedding_B"): FACTORS[B]}, CONFIG, "is not understood beside"),
    ("E-an-unknown-key", FACTORS, {**CONFIG, "use_qalora": True}, "'use_qalora' is True, which this version cannot"),
    ("E-a-base-that-was-changed", FACTORS, {**CONFIG, "init_lora_weights": "pissa"}, "'pissa', which changed the base"),
    ("E-integers", {A: np.ones((2, 6), np.int32), B: FACTORS[B]}, CONFIG, "is I32, expected floating numbers"),
    ("E-FLoRA-without-a-factor", {"x.param_0": FACTORS[A], "x.param_G": CORE}, FLORA,
     "'x' has .*, expected param_G and a param_ per axis"),
    ("E-FLoRA-of-another-rank", {"x.param_0": FACTORS[A], "x.param_1": FACTORS[B], "x.param_G": CORE}, FLORA,
     r"param_1' is \[6, 2\], beside a core \[6, 3\]"),
    ("E-MoS-without-tables", {"pool.q.lora_A.weight": FACTORS[A]}, MOS, "is not understood: no module uses it"),
    ("E-MoS-that-points-outside", {**POOLS, "index_A.x.q": np.array([0, 4]), "index_B.x.q": np.array([0, 1])},
     MOS, "index_A.x.q' points outside of a pool of 4"),
    (
        "E-a-grouped-convolution",
        {A: np.ones((2, 4, 3, 3), np.float32), B: np.ones((6, 1, 1, 1), np.float32)},
        CONFIG,
        "factors of grouped convolutions cannot be merged",
    ),
]  # fmt: skip


def applied(folder: Path, tensors: dict[str, Any], config: object, width: int = 6) -> Path:
    """A base of one square matrix, and the adapter on it."""
    (folder / "base").mkdir()
    save_file({"layers.0.q.weight": np.ones((width, width), np.float32)}, folder / "base" / FILE, {"format": "pt"})
    put(folder / "adapter", tensors, config)
    return Path(f"{folder / 'base'}+{folder / 'adapter'}")


def without_config(folder: Path) -> Path:
    """The adapter's weights alone."""
    found = applied(folder, FACTORS, CONFIG)
    (folder / "adapter" / "adapter_config.json").unlink()
    return found


def _attack(name: str, tensors: dict[str, Any], config: object, pattern: str) -> Attack:
    return Attack(name, lambda folder: applied(folder, tensors, config), pattern, ("adapter",))


ELSEWHERE = {name.replace("layers.0.q", "layers.7.q"): array for name, array in FACTORS.items()}
ATTACKS = [
    *(_attack(*row) for row in BAD),
    Attack("E89-no-config", without_config, "holds no adapter_config.json", ("adapter",)),
    _attack("E93-target-absent", ELSEWHERE, CONFIG, "'layers.7.q.weight'"),
    Attack("E95-another-base", lambda folder: applied(folder, FACTORS, CONFIG, 8), r"\[8, 8\]", ("layers.0.q",)),
]

"""Adapters as they lie on disk: every tensor of the file gets its meaning, or the file is refused in one line."""

from __future__ import annotations

import contextlib
import json
import shutil
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import smelt
from smelt.checkpoint import load_adapter
from smelt.checkpoint.adapter import LowRank, Rows, Saved, parse, read_adapter
from smelt.errors import InputRejected
from tests.peft_oracle import LORA, OTHERS, RECORDED

CASES = (*LORA, *OTHERS)
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


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_of_the_file_has_a_meaning(case: str) -> None:
    adapter = read_adapter(RECORDED / case)
    used = [tensor.name for update in adapter.updates for tensor in update.tensors()]
    assert sorted(used) == sorted(adapter.file.tensors)


def test_rank_and_scaling_follow_the_patterns() -> None:
    adapter = read_adapter(RECORDED / "rslora_patterns")
    found = {u.target: (u.rank, u.scaling) for u in adapter.updates if isinstance(u, LowRank)}
    assert found == {
        "layers.0.k.weight": (3, 6 / sqrt(3)), "layers.0.q.weight": (4, 6 / 2), "layers.0.up.weight": (4, 9 / 2),
        "layers.1.k.weight": (4, 6 / 2), "layers.1.q.weight": (2, 6 / sqrt(2)), "layers.1.up.weight": (4, 9 / 2),
    }  # fmt: skip


def test_parameters_of_one_module_are_told_apart_by_their_nesting() -> None:
    found = {u.target: u.experts for u in read_adapter(RECORDED / "experts").updates if isinstance(u, LowRank)}
    assert found == {"experts.down_proj": 3, "experts.gate_up_proj": 3}


def test_what_was_trained_whole_comes_before_what_is_added() -> None:
    updates = read_adapter(RECORDED / "modules_to_save").updates
    assert [u.target for u in updates if isinstance(u, Saved)] == ["embed.weight", "head.weight"]
    assert isinstance(updates[0], Saved)
    (rows,) = (u for u in read_adapter(RECORDED / "tokens").updates if isinstance(u, Rows))
    assert (rows.target, rows.tokens) == ("embed.weight", (1, 5, 2))


def test_arrays_in_memory_are_adapters_as_well() -> None:
    adapter = parse(smelt.load(FACTORS), CONFIG)
    (update,) = adapter.updates
    assert isinstance(update, LowRank)
    assert (update.a.name, update.b.name, update.scaling, update.form) == (A, B, 2.0, "linear")


BAD: list[tuple[str, dict[str, Any], object, str]] = [
    ("89 config is no JSON", FACTORS, "{", "adapter_config.json.* is not valid JSON"),
    ("89 config is a list", FACTORS, "[]", "adapter_config.json.* holds .*, expected an object"),
    ("90 another kind", FACTORS, {"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING', .* known: LORA"),
    ("90 no kind", FACTORS, {"r": 2}, "peft_type is None"),
    ("91 A alone", {A: FACTORS[A]}, CONFIG, "lora_A.* is there, but .*lora_B.weight' is missing"),
    ("92 another rank", FACTORS, {**CONFIG, "r": 3}, r"lora_A.weight' is \[2, 6\], for rank 3"),
    ("92 another rank by pattern", FACTORS, {**CONFIG, "rank_pattern": {"q": 4}}, r"is \[2, 6\], for rank 4"),
    ("92 factors of two ranks", {**FACTORS, B: np.ones((6, 3), np.float32)}, CONFIG, r"is \[6, 3\], beside \[2, 6\]"),
    ("94 DoRA without magnitudes", FACTORS, {**CONFIG, "use_dora": True}, "without lora_magnitude_vector.*use_dora"),
    (
        "94 magnitudes without DoRA",
        {**FACTORS, A.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(6, np.float32)},
        CONFIG,
        "with lora_magnitude_vector, against use_dora",
    ),
    (
        "97 endless pattern",
        FACTORS,
        {**CONFIG, "rank_pattern": {"(a+)+b": 2}},
        r"rank_pattern: '\(a\+\)\+b' is too complex",
    ),
    ("97 no pattern", FACTORS, {**CONFIG, "alpha_pattern": {"(": 2}}, "is no regular expression"),
    ("98 alpha of nothing", FACTORS, {**CONFIG, "lora_alpha": 0}, "lora_alpha of 'layers.0.q' is 0"),
    ("98 alpha is NaN", FACTORS, '{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}', "lora_alpha of .* is nan"),
    ("98 rank of nothing", FACTORS, {**CONFIG, "r": 0}, "the rank of 'layers.0.q' is 0, expected 1 or more"),
    ("98 rank is text", FACTORS, {**CONFIG, "r": "2"}, "the rank of 'layers.0.q' is '2'"),
    ("an unknown tensor", {**FACTORS, "x.y": FACTORS[A]}, CONFIG, "tensor 'x.y' is not understood"),
    ("one name in two ways", {**FACTORS, A.removeprefix("base_model.model."): FACTORS[A]}, CONFIG,
     "lora_A.weight' is not understood beside"),
    ("one tensor stored twice", {"x.bias": FACTORS[A], "x.base_layer.bias": FACTORS[A]}, {**CONFIG, "bias": "all"},
     "'x.bias' is stored 2 times"),
    ("an embedding and a matrix at once", {**FACTORS, A.replace("A.weight", "embedding_A"): FACTORS[A],
     A.replace("A.weight", "embedding_B"): FACTORS[B]}, CONFIG, "is not understood beside"),
    ("an unknown key", FACTORS, {**CONFIG, "use_qalora": True}, "'use_qalora' is True, which this version cannot"),
    ("a base that was changed", FACTORS, {**CONFIG, "init_lora_weights": "pissa"}, "'pissa', which changed the base"),
    ("integers", {A: np.ones((2, 6), np.int32), B: FACTORS[B]}, CONFIG, "is I32, expected floating numbers"),
    ("FLoRA without a factor", {"x.param_0": FACTORS[A], "x.param_G": CORE}, FLORA,
     "'x' has .*, expected param_G and a param_ per axis"),
    ("FLoRA of another rank", {"x.param_0": FACTORS[A], "x.param_1": FACTORS[B], "x.param_G": CORE}, FLORA,
     r"param_1' is \[6, 2\], beside a core \[6, 3\]"),
    ("MoS without tables", {"pool.q.lora_A.weight": FACTORS[A]}, MOS, "is not understood: no module uses it"),
    ("MoS that points outside", {**POOLS, "index_A.x.q": np.array([0, 4]), "index_B.x.q": np.array([0, 1])},
     MOS, "index_A.x.q' points outside of a pool of 4"),
    (
        "a grouped convolution",
        {A: np.ones((2, 4, 3, 3), np.float32), B: np.ones((6, 1, 1, 1), np.float32)},
        CONFIG,
        "factors of grouped convolutions cannot be merged",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "config", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_adapter_is_refused_in_one_line(
    tensors: dict[str, Any], config: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputRejected, match=message) as caught:
        read_adapter(put(tmp_path / "adapter", tensors, config))
    assert all("\n" not in problem for problem in caught.value.problems)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text("q.*(+[\\", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["q", "layers.0.q", "(", "x"]), inner),
    max_leaves=4,
)


@given(st.sampled_from(CASES), st.data())
def test_a_config_of_anything_is_taken_or_refused(case: str, data: st.DataObject) -> None:
    config = json.loads((RECORDED / case / "adapter_config.json").read_text())
    key = data.draw(st.sampled_from(sorted(config)))
    with read_adapter(RECORDED / case).file as file, contextlib.suppress(InputRejected):
        parse(file, {**config, key: data.draw(json_values)})


def test_an_adapter_without_config_is_refused(tmp_path: Path) -> None:
    shutil.copy(RECORDED / "lora" / "adapter_model.safetensors", tmp_path)
    with pytest.raises(InputRejected, match=r"holds no adapter_config.json"):
        read_adapter(tmp_path)


def test_the_file_is_still_read_under_its_own_names() -> None:
    with load_adapter(RECORDED / "lora") as file:
        assert all(name.startswith("base_model.model.") for name in file)

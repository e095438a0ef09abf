"""Adapters as they lie on disk: every tensor of the file gets its meaning, or the file is refused in one line."""

from __future__ import annotations

import contextlib
import json
import shutil
from math import sqrt
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import smelt
from smelt.checkpoint import load_adapter
from smelt.checkpoint.adapter import LowRank, Rows, Saved, parse, read_adapter
from smelt.errors import InputRejected
from tests.adapter_attacks import CONFIG, FACTORS, A, B
from tests.peft_oracle import LORA, OTHERS, RECORDED

CASES = (*LORA, *OTHERS)


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

"""Every bad file and folder of the corpus is refused in one line that helps, and nothing stays open."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import smelt
from smelt.errors import SmeltError

from .attacks import ATTACKS, Attack


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_refused_in_one_line(attack: Attack, tmp_path: Path) -> None:
    source = attack.make(tmp_path)
    before = open_files()
    with pytest.raises(SmeltError) as caught:
        smelt.load(str(source))
    assert open_files() == before
    assert caught.value.exit_code == attack.exit_code
    message = str(caught.value)
    assert re.search(attack.pattern, message), message
    assert all(name in message for name in attack.mentions), message
    assert all(line.isprintable() and len(line) < 2000 for line in caught.value.problems), message


def test_names_are_unique() -> None:
    names = [attack.name for attack in ATTACKS]
    assert sorted(set(names)) == sorted(names)


FILES = [attack for attack in ATTACKS if attack.name.startswith("A") and not attack.name.startswith(("A35", "A40"))]


@pytest.mark.parametrize("attack", FILES, ids=lambda attack: attack.name)
def test_every_bad_shard_gets_its_line(attack: Attack, tmp_path: Path) -> None:
    model, part = tmp_path / "model", tmp_path / "part"
    model.mkdir()
    part.mkdir()
    shards = [model / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard in shards:
        attack.make(part).rename(shard)
    with pytest.raises(smelt.InputRejected) as caught:
        smelt.load(model)
    assert [shard.name in line for shard, line in zip(shards, caught.value.problems, strict=True)] == [True, True]

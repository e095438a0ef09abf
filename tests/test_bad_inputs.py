"""Every bad input through the command line: what is told, what is touched, and what is left."""

from __future__ import annotations

import json
import os
import re
import resource
import time
from pathlib import Path

import pytest

import smelt
from tests import adapter_attacks, bad_inputs
from tests.attacks import Attack
from tests.audit import listening, strange
from tests.bad_inputs import FILES
from tests.commands import refused_merge


@pytest.mark.parametrize("attack", FILES, ids=lambda attack: attack.name)
def test_refused_on_the_command_line(attack: Attack, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    source = attack.make(tmp_path / "model")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps({"merge_method": "passthrough", "models": [{"model": str(source)}]}))
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with listening() as opened:
        code, told = refused_merge(capsys, recipe, tmp_path / "out", *attack.options)
    assert code == attack.exit_code
    message = "\n".join(told)
    assert re.search(attack.pattern, message), message
    assert all(name in message for name in attack.mentions), message
    assert strange(opened, tmp_path) == []
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kB
    assert sorted(os.listdir(tmp_path)) == ["model", "recipe.yml"]


def test_what_an_adapter_says_of_its_base_is_not_opened(tmp_path: Path) -> None:
    """E96: only what the user names is read."""
    elsewhere = {**adapter_attacks.CONFIG, "base_model_name_or_path": "../../../../etc/passwd"}
    source = adapter_attacks.applied(tmp_path, adapter_attacks.FACTORS, elsewhere)
    smelt.merge({"merge_method": "passthrough", "models": [{"model": str(source)}]}, tmp_path / "warm")  # compiles
    with listening() as opened:
        smelt.merge({"merge_method": "passthrough", "models": [{"model": str(source)}]}, tmp_path / "out")
    assert strange(opened, tmp_path) == []


def test_every_entry_of_the_list_has_its_place() -> None:
    covered = {*bad_inputs.generated(), *bad_inputs.ELSEWHERE}
    assert covered | set(bad_inputs.ACCEPTED) == set(range(1, 136))
    assert bad_inputs.missing_tests() == []
    assert covered & set(bad_inputs.ACCEPTED) == set()

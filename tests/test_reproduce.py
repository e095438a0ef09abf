"""The manifest is enough to make the same bits again, wherever the models have gone meanwhile."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import smelt
from smelt.cli import main
from smelt.engine import reproduce
from smelt.errors import InputRejected
from tests.recipes import Family, recipe
from tests.small_models import save


def test_the_same_bits_come_out_again(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random draws, shards, a seed from the command line, and models that have moved."""
    tree = recipe("dare_ties", family.models, family.base, each={"density": 0.5, "weight": 0.4})
    smelt.merge(tree, tmp_path / "out", seed=7, shard_size="50kB", card=False, threads=1)
    moved = Path(shutil.copytree(family.folder, tmp_path / "moved"))
    assert main(["reproduce", str(tmp_path / "out"), "--models", str(moved), "--threads", "2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: the same bits, 21 tensors\n"
    assert sorted(os.listdir(tmp_path)) == ["moved", "out"]


def test_what_stages_have_made_comes_out_again(family: Family, tmp_path: Path) -> None:
    soup = recipe("linear", family.models[:2], dtype="float32")
    outer = {"merge_method": "slerp", "base_model": soup, "models": [{"model": family.models[2]}]}
    smelt.merge({**outer, "parameters": {"t": 0.5}}, tmp_path / "out")
    assert reproduce(tmp_path / "out", {Path(path).name: path for path in family.models}).ok


def test_another_model_is_named(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smelt.merge(recipe("linear", family.models[:2]), tmp_path / "out")
    other = save(tmp_path / "other", family.model_arrays[2])
    where = ["-m", f"expert0={family.models[0]}", "-m", f"expert1={other}"]
    assert main(["reproduce", str(tmp_path / "out"), *where]) == 1
    told = capsys.readouterr().err
    assert "tensor 'lm_head.weight' came out differently" in told
    assert "note: the model 'expert1' is not the one that was merged then" in told
    assert "expert0" not in told


def test_what_is_no_merge_is_refused(family: Family, tmp_path: Path) -> None:
    smelt.merge(recipe("linear", family.models[:2]), tmp_path / "out")
    path = tmp_path / "out" / "smelt-manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "method": "extract_lora"}))
    with pytest.raises(InputRejected, match="made by 'extract_lora', which is no merge"):
        reproduce(tmp_path / "out")
    assert main(["reproduce", str(tmp_path / "out"), "-m", "expert0"]) == 2

"""Dry runs of what makes adapters and converts: bounds that hold, and nothing on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import smelt
from smelt.adapters import (
    extract_delta,
    extract_lora,
    merge_lora,
    plan_extract_delta,
    plan_extract_lora,
    plan_merge_lora,
)
from smelt.cli import main
from smelt.errors import InputRejected, UsageError
from tests.lora_files import factors, save_adapter
from tests.small_models import CONFIG, bf16, fine_tuned, llama, save


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    base = llama(0)
    return save(tmp_path / "base", bf16(base)), save(tmp_path / "model", bf16(fine_tuned(base, 1)))


@pytest.fixture
def adapters(tmp_path: Path) -> list[str]:
    return [str(save_adapter(tmp_path / f"a{rank}", factors(rank, rank))) for rank in (3, 5)]


def kept(plan: Any, made: Any) -> None:
    """What was foretold holds: of every module the kind and the rank, and the sizes of all."""
    assert [row.module for row in plan.modules] == [row.module for row in made.modules]
    for told, found in zip(plan.modules, made.modules, strict=True):
        assert found.rank <= told.rank or told.stored == "whole", told
        assert found.stored in (told.stored, "nothing"), told
    assert 0 < made.bytes_written <= plan.bytes_written <= plan.disk_needed
    assert made.bytes_read <= plan.bytes_read


@pytest.mark.parametrize("options", [{"rank": 4}, {"embeddings": True, "error": 0.2}, {"form": "flora", "rank": 3},
                                     {"exclude": ("norm",), "save_modules": ("down_proj",)}])  # fmt: skip
def test_extracting(tmp_path: Path, pair: tuple[str, str], options: dict[str, Any]) -> None:
    plan = plan_extract_lora(*pair, tmp_path / "out", threads=2, **options)
    assert not (tmp_path / "out").exists()
    assert plan.threads == 2
    kept(plan, extract_lora(*pair, tmp_path / "out", **options))


@pytest.mark.parametrize("options", [{"form": "sign"}, {"form": "sparse", "density": 0.1, "value_dtype": "bfloat16"}])
def test_packing(tmp_path: Path, pair: tuple[str, str], options: dict[str, Any]) -> None:
    plan = plan_extract_delta(*pair, tmp_path / "out", **options)
    made = extract_delta(*pair, tmp_path / "out", **options)
    kept(plan, made)
    assert plan.bytes_written < 1.01 * made.bytes_written  # all tensors differ


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"combination_type": "cat"}, {"method": "linear", "rank": 4},
                                     {"combination_type": "svd", "rank": 3, "factor_dtype": "bfloat16"}])  # fmt: skip
def test_merging(tmp_path: Path, adapters: list[str], options: dict[str, Any]) -> None:
    plan = plan_merge_lora(adapters, tmp_path / "out", **options)
    kept(plan, merge_lora(adapters, tmp_path / "out", **options))


def test_what_is_wrong_is_told(tmp_path: Path, pair: tuple[str, str], adapters: list[str]) -> None:
    with pytest.raises(UsageError, match="exists and is not empty"):
        plan_extract_lora(*pair, pair[0])
    with pytest.raises(UsageError, match="memory must be at least"):
        plan_extract_lora(*pair, tmp_path / "out", memory=1)
    with pytest.raises(UsageError, match="form: sparse needs density"):
        plan_extract_delta(*pair, tmp_path / "out", form="sparse")
    with pytest.raises(UsageError, match="1 weights for 2 adapters"):
        plan_merge_lora(adapters, tmp_path / "out", weights=[1.0])
    with pytest.raises(InputRejected, match="is this the base of it"):
        plan_extract_lora(save(tmp_path / "other", {"a.weight": llama(0)["lm_head.weight"]}), pair[1], tmp_path / "out")


def test_the_command_line(
    tmp_path: Path, pair: tuple[str, str], adapters: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    commands = {
        ("lora", "extract", *pair, out, "--rank", "4"): "at most", ("lora", "merge", *adapters, out): "peak memory",
        ("lora", "pack", *pair, out, "--form", "sign"): "disk needed", ("convert", pair[0], out): "peak memory",
    }  # fmt: skip
    for command, words in commands.items():
        assert main([*command, "--dry-run"]) == 0
        assert words in capsys.readouterr().out
        assert main([*command, "--dry-run", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts.keys() >= {"inputs", "bytes_read", "bytes_written", "disk_needed", "peak_memory", "threads"}
    assert sorted(tmp_path.rglob("*")) == before


def test_a_conversion_is_planned_as_it_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "m", llama(0), config={**CONFIG, "max_position_embeddings": 64})
    for options in (["--dtype", "float16"], ["--format", "gguf", "--dtype", "q8_0"], ["--dtype", "fp8_block"]):
        out = tmp_path / options[-1]
        assert main(["convert", source, str(out), *options, "--dry-run", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        made = smelt.convert(source, out, dtype=options[-1], format="gguf" if "gguf" in options else "safetensors")
        assert (told["bytes_read"], told["bytes_written"]) == (made.bytes_read, made.bytes_written)
    assert main(["convert", source, source, "--dry-run"]) == 2
    assert main(["convert", source, str(tmp_path / "x"), "--dtype", "q8_0", "--dry-run"]) == 2

"""Malformed GGUF: one clear line each, before anything is allocated; nothing but declared errors, whatever it is."""

from __future__ import annotations

import contextlib
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smelt
from smelt.errors import InputRejected, SmeltError
from tests.commands import refusal
from tests.gguf_attacks import BAD, ONE, WEIGHT, file
from tests.gguf_files import KINDS, LLAMA, packed, save_llama, stored_llama, text
from tests.small_models import llama


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_file_takes_no_memory(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    (tmp_path / "m.gguf").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InputRejected, match=message) as caught:
            smelt.load(tmp_path / "m.gguf")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert "m.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tensor_that_is_given_twice(tmp_path: Path) -> None:
    whole = file(tensors={"a": WEIGHT, "b": WEIGHT})
    (tmp_path / "m.gguf").write_bytes(whole.replace(text("b"), text("a")))
    with pytest.raises(InputRejected, match="has tensor 'a' twice"):
        smelt.load(tmp_path / "m.gguf")


def test_a_missing_part_of_a_set(tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(file(metadata={**ONE, "split.count": ("H", 3)}))
    with pytest.raises(
        InputRejected, match=r"2 of the 3 files of its set are missing, such as 'm-00002-of-00003\.gguf'"
    ):
        smelt.load(tmp_path / "m-00001-of-00003.gguf")


def test_a_file_that_changes_is_told(tmp_path: Path) -> None:
    path = Path(save_llama(tmp_path / "m.gguf", llama(1), quantised=True))
    with smelt.load(path) as model:
        path.write_bytes(path.read_bytes() + b"more")
        with pytest.raises(SmeltError, match="changed while it was being read"):
            model.check_unchanged()


def test_bytes_behind_the_last_tensor_are_told(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(file() + bytes(100))
    with smelt.load(tmp_path / "m.gguf") as model:
        assert any("100 bytes follow the last tensor" in notice for notice in model.notices)


def test_commands_refuse_with_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").write_bytes(file(version=1))
    recipe = f"merge_method: linear\nmodels: [{{model: {tmp_path}/m.gguf, parameters: {{weight: 1}}}}]\n"
    (tmp_path / "r.yml").write_text(recipe)
    for command in (("inspect", tmp_path / "m.gguf"), ("merge", tmp_path / "r.yml", tmp_path / "out")):
        code, lines = refusal(capsys, *command)
        assert (code, len(lines), "version 1" in lines[0]) == (3, 1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "r.yml"]


@pytest.mark.parametrize("odd", [("I", [1, 2]), ["a", "b"], "text", ("f", float("nan")), ("i", -1), ("?", True)])
def test_settings_of_any_type_are_no_trouble(tmp_path: Path, odd: Any) -> None:
    """What is not understood is left out of the config, or refused."""
    keys = [
        *LLAMA, "llama.expert_count", "llama.vocab_size", "llama.rope.scaling.type", "llama.rope.scaling.factor",
        "llama.rope.scaling.original_context_length", "general.name", "split.count", "split.tensors.count",
        "tokenizer.ggml.bos_token_id", "tokenizer.ggml.tokens", "llama.attention.key_length",
    ]  # fmt: skip
    factors = {"rope_freqs.weight": (0, (8,), np.ones(8, np.float32).tobytes())}
    tensors = {"blk.0.attn_q.weight": (0, (8, 32), bytes(1024)), **factors}
    for architecture in ("llama", "gemma2", "phi3"):
        for key in keys:
            own = {name.replace("llama.", f"{architecture}."): item for name, item in LLAMA.items()}
            own |= {"general.architecture": architecture, key.replace("llama.", f"{architecture}."): odd}
            (tmp_path / "m.gguf").write_bytes(packed(own, tensors))
            with contextlib.suppress(InputRejected):
                smelt.load(tmp_path / "m.gguf").close()


def mutated(whole: bytes, header: int, random: np.random.Generator) -> bytes:
    """A file with some bytes of its header changed, or numbers put there that often break readers, or cut short."""
    data = bytearray(whole)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(0, header - 8))
        kind = random.integers(0, 3)
        if kind == 0:
            data[at] = random.integers(0, 256)
        elif kind == 1:
            data[at : at + 4] = struct.pack("<I", random.choice([0, 1, 9, 1 << 31, (1 << 32) - 1, *KINDS.values()]))
        else:
            data[at : at + 8] = struct.pack("<Q", int(random.choice([0, 1, 1 << 32, (1 << 63) - 1])))
    return bytes(data[: random.integers(0, len(data))] if random.random() < 0.1 else data)


def test_damaged_headers_give_declared_errors_only(tmp_path: Path) -> None:
    """Whatever is accepted, the gguf package reads too, where it is there; and it can be read to its end."""
    tokens = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": ("f", [0.0, 1.0]), "x": ("?", True)}
    stored = [
        (name, (0, array.shape, array.tobytes())) for name, array in stored_llama(llama(1)).items() if "blk.0" in name
    ]
    whole = packed(
        {**LLAMA, **tokens}, {**dict(stored), "rope_freqs.weight": (0, (8,), np.ones(8, np.float32).tobytes())}
    )
    header = len(whole) - sum(len(raw) for _, (_, _, raw) in stored)
    random, path = np.random.default_rng(5), tmp_path / "m.gguf"
    accepted = 0
    for _ in range(1500):
        path.write_bytes(mutated(whole, header, random))
        began = time.monotonic()
        try:
            with smelt.load(path) as model:
                for name in model:
                    model[name]
                accepted += 1
                _others_accept(path)
        except SmeltError:
            pass
        assert time.monotonic() - began < 5
    assert 50 < accepted < 1400


def _others_accept(path: Path) -> None:
    try:
        import gguf
    except ImportError:
        return
    assert gguf.GGUFReader(path).tensors

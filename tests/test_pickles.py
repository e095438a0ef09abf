"""Pickled weights: read only on request, by position, without torch, and without running what is in them."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import smelt
from smelt.cli import main
from smelt.errors import InputRejected
from tests.commands import refusal
from tests.lora import written
from tests.pickle_attacks import DATA, ONE, WEIGHTS, plain
from tests.pickled import mapping, number, numbers, pickled, save, save_arrays, tensor
from tests.small_models import fine_tuned, llama
from tests.small_models import save as save_model


def opened(path: Path) -> Any:
    return smelt.load(path, allow_pickle=True)


def test_views_read_as_torch_reads_them(tmp_path: Path) -> None:
    """Transposed, cut and shared: all on one storage, each in pieces from anywhere."""
    views = {
        "whole": (tensor("0", (3, 4)), WEIGHTS),
        "tied": (tensor("0", (3, 4)), WEIGHTS),
        "turned": (tensor("0", (4, 3), (1, 4), count=12), WEIGHTS.T),
        "column": (tensor("0", (3, 2), (4, 1), offset=1, count=12), WEIGHTS[:, 1:3]),
        "every second": (tensor("0", (6,), (2,), count=12), WEIGHTS.reshape(-1)[::2]),
        "last": (tensor("0", (), (), offset=11, count=12), WEIGHTS[2, 3]),
        "none": (tensor("0", (0, 5), count=12), np.empty((0, 5), np.float32)),
    }
    save(tmp_path / "model.pt", mapping({name: made for name, (made, _) in views.items()}), DATA)
    with opened(tmp_path / "model.pt") as found:
        for name, (_, wanted) in views.items():
            np.testing.assert_array_equal(found[name], wanted, name)
            part = np.empty(wanted.size // 2, np.float32)
            found.read(name, wanted.size // 3, part)
            np.testing.assert_array_equal(part, wanted.reshape(-1)[wanted.size // 3 :][: part.size], name)


def test_large_scattered_tensors_are_gathered_piece_by_piece(tmp_path: Path) -> None:
    wide = np.arange(3000 * 700, dtype=np.float32).reshape(3000, 700)
    save(tmp_path / "model.pt", mapping({"w": tensor("0", (700, 3000), (1, 700))}), {"data/0": wide.tobytes()})
    with opened(tmp_path / "model.pt") as found:
        out = np.empty(20_000, np.float32)
        tracemalloc.start()
        found.read("w", 1_234_567, out)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        np.testing.assert_array_equal(out, wide.T.reshape(-1)[1_234_567:][:20_000])
        assert peak < wide.nbytes / 2


def test_torch_and_this_reader_agree(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    made = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=made)
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn]
    state = {str(dtype): base.to(dtype) for dtype in dtypes}
    state |= {"turned": base.T, "cut": base[1:4, 2:7], "step": base[::2, ::3], "parameter": torch.nn.Parameter(base)}
    torch.save(torch.nn.Linear(3, 2).state_dict() | state, tmp_path / "model.bin")
    expected = torch.load(tmp_path / "model.bin", weights_only=True)
    with opened(tmp_path / "model.bin") as found:
        assert found.keys() == expected.keys()
        for name, wanted in expected.items():
            kept = wanted.detach().contiguous()
            assert found[name].shape == tuple(wanted.shape), name
            assert found[name].tobytes() == kept.reshape(-1).view(torch.uint8).numpy().tobytes(), name


def folder_of(tmp_path: Path) -> Path:
    """Two shards with their index, and what a trainer leaves beside them."""
    home = tmp_path / "model"
    home.mkdir()
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    save_arrays(home / names[0], {"a.weight": WEIGHTS})
    save_arrays(home / names[1], {"b.weight": WEIGHTS + 1})
    (home / "training_args.bin").write_bytes(b"nothing to read")
    weight_map = {"a.weight": names[0], "b.weight": names[1]}
    (home / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return home


def test_shards_with_and_without_their_index(tmp_path: Path) -> None:
    home = folder_of(tmp_path)
    for _ in range(2):
        with opened(home) as found:
            np.testing.assert_array_equal(found["b.weight"], WEIGHTS + 1)
            assert list(found) == ["a.weight", "b.weight"]
        (home / "pytorch_model.bin.index.json").unlink(missing_ok=True)


def test_safetensors_come_first(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    home = folder_of(tmp_path)
    save_file({"plain": WEIGHTS}, home / "model.safetensors")
    assert list(opened(home)) == list(smelt.load(home)) == ["plain"]


@pytest.mark.parametrize("command", ["inspect", "check", "convert"])
def test_nothing_pickled_is_read_unasked(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = folder_of(tmp_path)
    more = {"inspect": [], "check": [home], "convert": [tmp_path / "out"]}
    code, problems = refusal(capsys, command, home, *more[command])
    assert code == 3
    assert "is pickled: --allow-pickle reads" in problems[0]


def test_a_merge_of_pickled_models(tmp_path: Path) -> None:
    home = folder_of(tmp_path)
    tree = {"merge_method": "passthrough", "models": [{"model": str(home)}]}
    with pytest.raises(InputRejected, match="is pickled"):
        smelt.merge(tree, tmp_path / "out")
    smelt.merge(tree, tmp_path / "out", allow_pickle=True)
    np.testing.assert_array_equal(smelt.load(tmp_path / "out")["b.weight"], WEIGHTS + 1)
    found = smelt.check([home, tmp_path / "out"], allow_pickle=True).findings
    assert [finding.code for finding in found if finding.severity == "error"] == []


def pickled_llama(tmp_path: Path) -> tuple[Path, Path]:
    """A fine-tune, pickled, and its base as safetensors; both with a tokenizer."""
    plain, old = Path(save_model(tmp_path / "plain", llama(0))), tmp_path / "old"
    old.mkdir()
    save_arrays(old / "pytorch_model.bin", fine_tuned(llama(0), 1))
    (old / "config.json").write_bytes((plain / "config.json").read_bytes())
    words = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"},
             "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(96)}, "unk_token": "w0"}}  # fmt: skip
    for home in (plain, old):
        (home / "tokenizer.json").write_text(json.dumps(words))
        (home / "tokenizer_config.json").write_text("{}")
    return old, plain


def test_every_command_reads_pickles_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, plain = pickled_llama(tmp_path)
    commands = {
        "extract": ["lora", "extract", plain, old, tmp_path / "extract", "--rank", "2"],
        "pack": ["lora", "pack", plain, old, tmp_path / "pack", "--form", "sparse", "--density", "0.5"],
        "transplant": ["tokenizer", "transplant", old, plain, tmp_path / "transplant", "--method", "mean"],
        "stack": ["stack", "repeat", old],
    }
    for name, command in commands.items():
        assert main([*map(str, command)]) == 3
        assert "is pickled: --allow-pickle reads" in capsys.readouterr().err
        assert main([*map(str, command), "--allow-pickle"]) == 0
        assert "layer_range" in capsys.readouterr().out if name == "stack" else (tmp_path / name).is_dir()


def test_a_pickled_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As old versions of PEFT saved them: alone, on a base, and in a merge of adapters."""
    _, base = pickled_llama(tmp_path)
    plain, old = written(tmp_path / "style", 3), written(tmp_path / "aged", 3)
    save_arrays(old / "adapter_model.bin", load_file(old / "adapter_model.safetensors"))
    (old / "adapter_model.safetensors").unlink()
    with pytest.raises(InputRejected, match=r"adapter_model\.bin' is pickled: --allow-pickle reads"):
        smelt.load(f"{base}+{old}")
    wanted, found = smelt.load(f"{base}+{plain}"), smelt.load(f"{base}+{old}", allow_pickle=True)
    assert all((found[name] == wanted[name]).all() for name in wanted)
    assert main(["inspect", str(old), "--allow-pickle"]) == 0
    assert main(["lora", "merge", str(old), str(plain), str(tmp_path / "sum")]) == 3
    assert main(["lora", "merge", str(old), str(plain), str(tmp_path / "sum"), "--allow-pickle"]) == 0
    tree = {"merge_method": "linear", "base_model": str(base), "models": [{"model": str(old)}],
            "parameters": {"weight": 1.0}}  # fmt: skip
    smelt.merge(tree, tmp_path / "out", allow_pickle=True)
    assert "is pickled" in capsys.readouterr().err


def test_what_trainers_wrap_around_it(tmp_path: Path) -> None:
    wrapped = {"epoch": number(3), "state_dict": mapping({"w": tensor("0", (3, 4))}), "hooks": b"cnumpy\ndtype\n"}
    found = opened(save(tmp_path / "last.ckpt", mapping(wrapped), DATA))
    assert list(found) == ["w"]
    assert found.notices == ["'last.ckpt': the tensors under 'state_dict' are read; left aside: 'epoch', 'hooks'"]


def test_a_pickle_of_nothing_but_work_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smelt.checkpoint.pickles.MAX_INSTRUCTIONS", 1000)
    with pytest.raises(InputRejected, match="more than 1000 instructions"):
        opened(save(tmp_path / "m.pt", b"N0" * 1000 + ONE, DATA))


def test_every_cut_and_every_flipped_byte_is_told_or_harmless(tmp_path: Path) -> None:
    """Whatever happens to a file, it is read or refused in our words."""
    whole = plain()
    random = np.random.default_rng(0)
    variants = [whole[:cut] for cut in range(0, len(whole), 7)]
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= int(random.integers(1, 256))
        variants.append(bytes(flipped))
    path = tmp_path / "m.pt"
    read = 0
    for variant in variants:
        path.write_bytes(variant)
        try:
            with opened(path) as found:
                read += sum(found[name].nbytes for name in found) > 0
        except InputRejected:
            pass
    assert 0 < read < len(variants)


def test_a_storage_under_too_many_names_is_refused(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.pt", mapping({f"w{i}": tensor("0", (100_000,)) for i in range(200)}), {"data/0": bytes(400_000)}
    )
    with pytest.raises(InputRejected, match=r"tensors of 80000000 bytes share the \d+ bytes of the file"):
        opened(path)


def test_protocol_4_and_py2_texts(tmp_path: Path) -> None:
    """What newer and older pickles write in place of the usual instructions."""
    name = b"\x8c\x01w\x94"
    made = b"\x95" + struct.pack("<Q", 9) + b"}" + name + tensor("0", (3, 4)) + b"sU\x01v" + tensor("0", (12,)) + b"s"
    found = opened(save(tmp_path / "m.pt", made, DATA))
    assert {n: found[n].shape for n in found} == {"v": (12,), "w": (3, 4)}


def test_numbers_in_tests_are_read_back() -> None:
    assert numbers([1]) == b"(" + number(1) + b"t"


def test_archives_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Sizes and places that do not fit into 32 bits stand in the wide fields; the file is sparse."""
    count = 5 << 28  # floats
    weights = mapping({"w": tensor("0", (count,)), "v": tensor("1", (3, 4))})
    entries = [("data.pkl", pickled(weights), 0), ("data/0", b"", 4 * count), ("data/1", DATA["data/0"], 0)]
    directory, full = b"", 0xFFFFFFFF
    with (tmp_path / "m.pt").open("wb") as file:
        for name, data, hole in entries:
            stored, begin, size = f"archive/{name}".encode(), file.tell(), len(data) + hole
            file.write(
                struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, 0, full, full, len(stored), 0) + stored + data
            )
            file.seek(hole, io.SEEK_CUR)
            wide = struct.pack("<2H3Q", 1, 24, size, size, begin)
            fixed = (45, 45, 0, 0, 0, 0, 0, full, full, len(stored), len(wide), 0, 0, 0, 0, full)
            directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", *fixed) + stored + wide
        begin = file.tell()
        end = begin + len(directory)
        file.write(directory + struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, len(directory), begin))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 3, 3, len(directory), full, 0))
    with opened(tmp_path / "m.pt") as found:
        np.testing.assert_array_equal(found["v"], WEIGHTS)
        last = np.ones(5, np.float32)
        found.read("w", count - 5, last)
        assert not last.any()

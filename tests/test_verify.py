"""`smelt verify` finds whatever differs from what was written, and names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import smelt
from smelt.errors import InputRejected
from tests.gguf_files import complete
from tests.recipes import Family, recipe

MANIFEST = "smelt-manifest.json"


@pytest.fixture(scope="module")
def published(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge in several shards; tests change copies of it."""
    out = tmp_path_factory.mktemp("published") / "out"
    smelt.merge(recipe("linear", family.models, out_dtype="float32"), out, shard_size="50kB")
    return out


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "out"))


def problems(folder: Path) -> list[str]:
    return smelt.verify(folder).problems


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_what_was_written_verifies(published: Path) -> None:
    found = smelt.verify(published)
    manifest = json.loads((published / MANIFEST).read_text())
    assert found.ok
    assert (found.tensors, found.files) == (len(manifest["tensors"]), len(manifest["files"]))


def test_a_flipped_bit_in_any_tensor_is_found_and_named(published: Path, folder: Path) -> None:
    """The first, the middle and the last byte of every weight file."""
    manifest = json.loads((published / MANIFEST).read_text())
    for shard in sorted(path.name for path in published.glob("*.safetensors")):
        inside = {name for name, tensor in manifest["tensors"].items() if tensor["file"] == shard}
        whole = (published / shard).read_bytes()
        begin = 8 + int.from_bytes(whole[:8], "little")
        for offset in (begin, (begin + len(whole)) // 2, len(whole) - 1):
            flip(folder / shard, offset)
            (told,) = problems(folder)
            assert "differs from the manifest" in told
            assert any(f"tensor {name!r} in {shard!r}" in told for name in inside)
            flip(folder / shard, offset)


def test_a_flipped_bit_in_any_other_file_is_found_and_named(published: Path, folder: Path) -> None:
    names = sorted(path.name for path in published.iterdir() if path.suffix != ".safetensors" and path.name != MANIFEST)
    assert {"README.md", "config.json", "tokenizer.json", "model.safetensors.index.json"} == set(names)
    for name in names:
        flip(folder / name, 10)
        assert problems(folder) == [f"file {name!r} differs from the manifest"]
        flip(folder / name, 10)


def test_a_flipped_bit_anywhere_in_a_header_is_found(folder: Path) -> None:
    """Also where it changes nothing that a loader looks at."""
    shard = sorted(folder.glob("*.safetensors"))[0]
    for offset in range(shard.read_bytes().index(b"data_offsets")):
        flip(shard, offset)
        assert any(shard.name in problem for problem in problems(folder)), offset
        flip(shard, offset)


def test_a_flipped_bit_anywhere_in_a_gguf_file_is_found(family: Family, tmp_path: Path) -> None:
    """In its metadata, between tensors, and in blocks that would read alike."""
    models = [complete(model, tmp_path / str(number)) for number, model in enumerate(family.models)]
    tree = {**recipe("linear", models), "output": {"format": "gguf", "dtype": "q8_0"}}
    out = smelt.merge(tree, tmp_path / "out").path
    assert smelt.verify(out).ok
    size = (out / "model.gguf").stat().st_size
    for offset in (*range(0, 4000, 37), *range(4000, size, size // 200), size - 1):
        flip(out / "model.gguf", offset)
        assert any("model.gguf" in problem for problem in problems(out)), offset
        flip(out / "model.gguf", offset)


@pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer.json"])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    assert problems(folder) == [f"file {name!r} is missing"]


def test_an_extra_file_is_named(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text("print(1)")
    assert problems(folder) == ["file 'modeling_evil.py' is not in the manifest"]


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    assert any(shard.name in problem for problem in problems(folder))


def rewritten(folder: Path, change: dict[str, np.ndarray | None]) -> list[str]:
    """Verify after rewriting the tensors of the first shard; None takes one away."""
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = {**load_file(shard), **change}
    kept = {name: array for name, array in tensors.items() if array is not None}
    save_file(kept, shard, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    homes = {name: file for name, file in content["weight_map"].items() if file != shard.name}
    content["weight_map"] = homes | dict.fromkeys(kept, shard.name)
    index.write_text(json.dumps(content))
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"]["model.safetensors.index.json"]
    index.unlink()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return problems(folder)


def first_tensor(folder: Path) -> tuple[str, np.ndarray]:
    tensors = load_file(sorted(folder.glob("*.safetensors"))[0])
    name = sorted(tensors)[0]
    return name, tensors[name]


def test_tensors_missing_added_or_of_another_type_are_named(published: Path, tmp_path: Path) -> None:
    name, array = first_tensor(published)
    cases: dict[str, dict[str, np.ndarray | None]] = {
        f"tensor {name!r} is missing": {name: None},
        "tensor 'extra' is not in the manifest": {"extra": np.ones(3, np.float32)},
        f"tensor {name!r} is F16": {name: array.astype(np.float16)},
        f"tensor {name!r} is F32 [{array.size}]": {name: array.reshape(-1)},
    }
    for index, (message, change) in enumerate(cases.items()):
        copy = Path(shutil.copytree(published, tmp_path / str(index)))
        (told,) = rewritten(copy, change)
        assert told.startswith(message)


def test_a_folder_without_manifest_was_not_made_by_smelt(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(InputRejected, match=rf"has no {MANIFEST}"):
        problems(folder)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": 2, "tensors": {}, "files": {}}', '{"format": 1}', '{"format": 1, "tensors": []}',
     '{"format": 1, "tensors": {}}', '{"format": 1, "tensors": {"a": 1}, "files": {}}', "[" * 100_000, "\xff"],
)  # fmt: skip
def test_a_manifest_that_is_none_is_refused(content: str, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputRejected, match="not a manifest"):
        problems(folder)


def test_names_in_a_manifest_are_never_used_as_paths(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["../../etc/passwd"] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert problems(folder) == ["file '../../etc/passwd' is missing"]
    del manifest["files"]["../../etc/passwd"]
    for tensor in manifest["tensors"].values():
        tensor["file"] = "../elsewhere.safetensors"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert problems(folder) == ["there is no file '../elsewhere.safetensors', which the manifest names"]

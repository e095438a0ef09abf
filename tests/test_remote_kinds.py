"""Whatever can be read from the disk is read from behind a URL as well: adapters, GGUF, codes, pipelines, pickles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

import smelt
from smelt.checkpoint import Checkpoint, open_adapter
from smelt.checkpoint.remote import blocks
from smelt.cli import main
from smelt.errors import InputRejected
from tests.gguf_files import save_llama
from tests.lora import written
from tests.pickled import save_arrays
from tests.recipes import Family, recipe
from tests.servers import FileServer, Handler, serving
from tests.test_gguf_read import SPLIT, split_llama
from tests.test_layouts import diffusers, files_of, put, sentence_transformer
from tests.test_layouts import recipe as mean
from tests.test_quantised_models import quantised_model
from tests.test_remote import BLOCK, COMMIT, fresh_store

KINDS = ("https", "hub", "bucket")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the servers serve; small blocks, and a cache of its own."""
    monkeypatch.setattr(blocks, "BLOCK", BLOCK)
    monkeypatch.setattr(blocks, "HEAD", 4 << 10)
    for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(switch, raising=False)
    fresh_store(tmp_path / "blocks", monkeypatch)
    (tmp_path / "root/owner").mkdir(parents=True)
    return tmp_path / "root/owner"


class Repositories(Handler):
    """/owner/name/resolve/COMMIT/path is the file owner/name/path."""

    def do_GET(self) -> None:  # noqa: N802
        self.path = self.path.replace(f"/resolve/{COMMIT}", "")
        super().do_GET()


@pytest.fixture(params=KINDS)
def prefix(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What stands before a model's name in its URL."""
    kind: str = request.param
    if kind == "bucket":
        as_bucket(home.parent)
    with serving(home.parent, Repositories if kind == "hub" else Handler) as server:
        if kind == "hub":
            as_hub(server, monkeypatch)
        yield {"https": f"{server.url}/owner", "hub": "hf://owner", "bucket": "shop://owner"}[kind]


def as_bucket(root: Path) -> None:
    """A file system of fsspec that is a folder."""
    fsspec = pytest.importorskip("fsspec")
    local = pytest.importorskip("fsspec.implementations.local").LocalFileSystem

    class Shop(local):  # type: ignore[misc,valid-type]
        protocol = "shop"
        cachable = False

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(root / path.removeprefix("shop://")) if path.startswith("shop://") else str(path)

    fsspec.register_implementation("shop", Shop, clobber=True)


def as_hub(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def __init__(self, endpoint: str | None = None) -> None:
            """Nothing to keep."""

        def model_info(self, repository: str, revision: str | None = None) -> Any:
            paths = files_of(server.root / repository)
            return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=path) for path in paths])

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_url",
        lambda repository, name, revision, endpoint: f"{endpoint}/{repository}/resolve/{revision}/{name}",
    )  # fmt: skip


def travelling(model: Checkpoint) -> dict[str, bytes]:
    """What copies of a model need beside the weights."""
    stored = model.side_files
    return {name: stored[name] for name in ("config.json", *model.beside) if name in stored}


def assert_same(found: Checkpoint, wanted: Checkpoint) -> None:
    assert list(found) == list(wanted)
    for name in wanted:
        assert found[name].tobytes() == wanted[name].tobytes(), name
    assert found.config == wanted.config
    assert travelling(found) == travelling(wanted)
    assert (found.scratch, wanted.scratch) == (blocks.SCRATCH, 0)


def test_an_adapter(prefix: str, home: Path, family: Family, tmp_path: Path, capsys: Any) -> None:
    """Behind the +, as a lora with its weight, alone in a recipe, and for inspection."""
    shutil.copytree(family.base, home / "base")
    local = str(written(home / "style", 3))
    remote = f"{prefix}/style"
    wanted, base = smelt.load(f"{family.base}+{local}"), str(family.base)
    for one, other in ((base, remote), (f"{prefix}/base", remote)):
        with smelt.load(f"{one}+{other}") as found:
            assert all((found[name] == wanted[name]).all() for name in wanted)
            assert found.label == f"{one}+{other}"
            assert found.scratch == blocks.SCRATCH
    for given in (
        {"model": {"model": f"{prefix}/base", "lora": {"path": remote, "weight": 0.5}}}, {"model": remote},
        {"model": f"{prefix}/base+{remote}"},
    ):  # fmt: skip
        tree = {"merge_method": "linear", "base_model": base, "models": [given], "parameters": {"weight": 1.0}}
        near = json.loads(json.dumps(given).replace(prefix, str(home)))
        smelt.merge(tree, tmp_path / "far")
        smelt.merge({**tree, "models": [near]}, tmp_path / "near")
        assert (tmp_path / "far/model.safetensors").read_bytes() == (tmp_path / "near/model.safetensors").read_bytes()
        for name in ("far", "near"):
            shutil.rmtree(tmp_path / name)
    assert main(["inspect", remote]) == 0
    assert "LORA" in capsys.readouterr().out
    with open_adapter(f"{remote}/adapter_model.safetensors").file as file:
        assert len(file) == 8
        assert file.revision == (COMMIT if prefix.startswith("hf") else None)
    main(["lora", "merge", remote, local, str(tmp_path / "sum"), "--quiet"])
    assert (tmp_path / "sum/adapter_model.safetensors").exists()


def test_an_adapter_without_config(prefix: str, home: Path, family: Family) -> None:
    before = family.base_arrays
    stored = load_file(written(home / "style", 3) / "adapter_model.safetensors")
    flat = {name.removeprefix("base_model.model."): array for name, array in stored.items()}
    save_file(flat, home / "style/any.safetensors")
    save_file(flat, home / "style/pytorch_lora_weights.safetensors")
    wanted = smelt.load(f"{family.base}+{home}/style/any.safetensors")
    for url in (f"{prefix}/style/any.safetensors", f"{prefix}/style"):
        with smelt.load(f"{family.base}+{url}") as found:
            assert all((found[name] == wanted[name]).all() for name in before)


def test_gguf(prefix: str, home: Path, family: Family, tmp_path: Path) -> None:
    (home / "packed").mkdir()
    arrays = family.model_arrays[0]
    local = save_llama(home / "packed/m.gguf", arrays, quantised=True)
    for url in (f"{prefix}/packed/m.gguf", *([f"{prefix}/packed"] if "http" not in prefix else [])):
        with smelt.load(url) as found:
            assert_same(found, smelt.load(local))
            assert found.label == url
    smelt.merge(recipe("linear", [f"{prefix}/packed/m.gguf", family.base]), tmp_path / "out")
    assert smelt.verify(tmp_path / "out").ok


def test_a_split_gguf(prefix: str, home: Path, family: Family) -> None:
    (home / "packed").mkdir()
    split_llama(home / "packed", family.model_arrays[0])
    with smelt.load(f"{prefix}/packed/{SPLIT[1]}") as found:
        assert_same(found, smelt.load(home / "packed" / SPLIT[0]))
    (home / "packed" / SPLIT[0]).unlink()
    with pytest.raises(InputRejected, match=rf"1 of the {len(SPLIT)} files of its set are missing, such as"):
        smelt.load(f"{prefix}/packed/{SPLIT[1]}")


def test_a_quantised_model(prefix: str, home: Path, family: Family) -> None:
    local, _ = quantised_model(home / "codes", family.model_arrays[0])
    with smelt.load(f"{prefix}/codes") as found:
        assert_same(found, smelt.load(local))


@pytest.mark.parametrize("make", [diffusers, sentence_transformer])
def test_a_pipeline(make: Any, prefix: str, home: Path, tmp_path: Path) -> None:
    """Where its folders cannot be listed, its files are known by their names, and that is told."""
    models = [make(home / name, seed) for seed, name in enumerate("ab")]
    with smelt.load(f"{prefix}/a") as found:
        assert_same(found, smelt.load(models[0]))
        assert any("lists no folders" in note for note in found.notices) == ("http" in prefix)
    smelt.merge(mean(*(f"{prefix}/{name}" for name in "ab")), tmp_path / "far")  # type: ignore[arg-type]
    smelt.merge(mean(*models), tmp_path / "near")
    assert files_of(tmp_path / "far") == files_of(tmp_path / "near")
    for file in files_of(tmp_path / "near") - {"smelt-manifest.json", "README.md"}:
        assert (tmp_path / "far" / file).read_bytes() == (tmp_path / "near" / file).read_bytes(), file


def test_what_a_pipeline_lacks_is_told(prefix: str, home: Path) -> None:
    put(home / "a", {"model_index.json": {"gone": ["d", "V"]}, "unet/x.json": {}})
    with pytest.raises(InputRejected, match="names the part 'gone', but there is no such folder"):
        smelt.load(f"{prefix}/a")


def test_pickles(prefix: str, home: Path, family: Family) -> None:
    (home / "old").mkdir()
    save_arrays(home / "old/pytorch_model.bin", family.base_arrays)
    url = f"{prefix}/old"
    with pytest.raises(InputRejected, match="is pickled: --allow-pickle"):
        smelt.load(url)
    with smelt.load(url, allow_pickle=True) as found:
        assert_same(found, smelt.load(home / "old", allow_pickle=True))


def test_the_plus_of_a_url_is_its_own(family: Family, home: Path) -> None:
    shutil.copytree(family.base, home / "a+b")
    written(home / "style", 3)
    with serving(home) as server, smelt.load(f"{server.url}/a+b") as found:
        assert set(found) == set(family.base_arrays)
        with smelt.load(f"{server.url}/a+b+{server.url}/style") as adapted:
            assert set(adapted) == set(found)
        with pytest.raises(InputRejected, match="is an adapter, not a model"):
            smelt.load(f"{server.url}/style")


def test_pickled_shards(prefix: str, home: Path, family: Family) -> None:
    (home / "old").mkdir()
    names = sorted(family.base_arrays)
    files = {name: f"pytorch_model-0000{1 + place % 2}-of-00002.bin" for place, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_arrays(home / "old" / file, {name: family.base_arrays[name] for name in names if files[name] == file})
    (home / "old/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    with smelt.load(f"{prefix}/old", allow_pickle=True) as found:
        assert_same(found, smelt.load(home / "old", allow_pickle=True))

"""Hub ids: the cache when offline, a stand-in for the hub when not. No test here touches a network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

import smelt
from smelt.checkpoint import hub, open_adapter

from .attacks import FILE, INDEX, ONE, TWO, good, indexed, put

COMMIT, OLDER = "0" * 39 + "1", "0" * 39 + "2"
ID = "owner/name"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; offline unless a test says otherwise, and unable to reach the hub in any case."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    return folder


def snapshot(cache: Path, commit: str = COMMIT, ref: str | None = "main", **files: bytes) -> Path:
    """A model in the cache, as huggingface_hub lays it out. ``files`` are blobs by name without suffix."""
    home = cache / "models--owner--name"
    folder = home / "snapshots" / commit
    folder.mkdir(parents=True)
    (home / "blobs").mkdir(exist_ok=True)
    for name, content in files.items():
        put(home / "blobs", content, f"{commit}-{name}")
        (folder / f"{name}.safetensors").symlink_to(f"../../blobs/{commit}-{name}")
    if ref is not None:
        put_ref(home, ref, commit)
    return folder


def put_ref(home: Path, ref: str, commit: str) -> None:
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / ref).write_text(commit)


# --- offline --------------------------------------------------------------------------------------------


def test_an_adapter_by_its_id(cache: Path, tmp_path: Path) -> None:
    case = Path(__file__).parent / "data" / "adapters" / "lora"
    folder = snapshot(cache, adapter_model=(case / "adapter_model.safetensors").read_bytes())
    (folder / "adapter_config.json").write_bytes((case / "adapter_config.json").read_bytes())
    (tmp_path / "base.safetensors").write_bytes((case.parent / "base.safetensors").read_bytes())
    with smelt.load(f"base.safetensors+{ID}@main") as checkpoint:
        assert checkpoint.tensors["layers.0.q.weight"].dtype == "F32"
        assert checkpoint.revision is None
    with pytest.raises(smelt.InputRejected, match="is an adapter, not a model"):
        smelt.load(ID)


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize("word", ["1", "ON", "yes", "True"])
def test_offline_means_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch, switch: str, word: str) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv(switch, word)
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    folder = snapshot(cache, model=good("a"))
    with smelt.load(ID) as checkpoint:
        assert list(checkpoint) == ["a"]
        assert (checkpoint.label, checkpoint.revision, checkpoint.folder) == (ID, COMMIT, folder)


@pytest.mark.parametrize(
    ("name", "revision", "commit"),
    [
        (ID, None, COMMIT), (f"{ID}@main", None, COMMIT), (f"{ID}@old", None, OLDER), (ID, "old", OLDER),
        (f"{ID}@{OLDER}", None, OLDER), (ID, COMMIT, COMMIT),
    ],
)  # fmt: skip
def test_revisions_resolve_to_commits(cache: Path, name: str, revision: str | None, commit: str) -> None:
    snapshot(cache, model=good("a"))
    snapshot(cache, OLDER, "old", model=good("b"))
    with smelt.load(name, revision=revision) as checkpoint:
        assert checkpoint.revision == commit
        assert checkpoint.label == name
        assert list(checkpoint) == ["a" if commit == COMMIT else "b"]


@pytest.mark.parametrize("name", ["owner/other", f"{ID}@nowhere", "m0"])
def test_not_in_the_cache(cache: Path, name: str) -> None:
    snapshot(cache, model=good("a"))
    with pytest.raises(
        smelt.InputRejected, match=r"no such folder.*not in the local cache \(HF_HUB_OFFLINE is set\)"
    ) as caught:
        smelt.load(name)
    assert f"'{name}'" in str(caught.value)


def test_near_names_are_told(tmp_path: Path) -> None:
    (tmp_path / "model-a").mkdir()
    with pytest.raises(smelt.InputRejected, match=r"did you mean 'model-a'\?"):
        smelt.load("modle-a")


@pytest.mark.parametrize("revision", ["../../secret", "/etc/passwd", "a\nb", "", "-x"])
def test_revisions_are_no_paths(cache: Path, revision: str) -> None:
    snapshot(cache, model=good("a"))
    with pytest.raises(smelt.InputRejected, match="no name of a revision") as caught:
        hub.fetch(ID, revision)
    assert str(caught.value).isprintable()


def test_an_existing_path_wins(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot(cache, model=good("hub"))
    (tmp_path / ID).mkdir(parents=True)
    put(tmp_path / ID, good("local"))
    monkeypatch.setattr(hub, "fetch", None)
    with smelt.load(ID) as checkpoint:
        assert list(checkpoint) == ["local"]
        assert checkpoint.revision is None


def test_an_interrupted_download(cache: Path) -> None:
    folder = snapshot(cache, model=good("a"))
    (cache / "models--owner--name" / "blobs" / f"{COMMIT}-model").unlink()
    with pytest.raises(smelt.InputRejected, match="link to a file that is not there: the download was interrupted"):
        smelt.load(ID)
    (folder / FILE).unlink()
    with pytest.raises(smelt.InputRejected, match="holds no weights"):
        smelt.load(ID)


def test_a_shard_that_is_still_on_its_way(cache: Path) -> None:
    folder = snapshot(cache)
    indexed({"a": ONE, "b": TWO}, {ONE: good("a")})(folder)
    put(folder.parent.parent / "blobs", b"half", "0123.incomplete")
    with pytest.raises(smelt.InputRejected, match=f"{TWO}.*a download is unfinished"):
        smelt.load(ID)


# --- online, with a stand-in for the hub ----------------------------------------------------------------

REPOSITORY = [
    FILE, "config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "README.md",
    "pytorch_model.bin", "model.gguf", "consolidated.safetensors", "script.py", "onnx/model.safetensors",
    "original/params.json", "weird[1].json",
]  # fmt: skip


@pytest.fixture
def online(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Let the hub hold these files; what is asked of it is recorded."""

    def begin(files: list[str], error: Exception | None = None) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        class Api:
            def model_info(self, repository: str, revision: str | None = None) -> Any:
                asked.append({"info": repository, "revision": revision})
                if error is not None:
                    raise error
                return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in files])

        def download(repository: str, **options: Any) -> str:
            asked.append({"download": repository, **options})
            if options.get("local_files_only"):
                return str(real(repository, **options))
            return str(snapshot(cache, model=good("a")))

        real = huggingface_hub.snapshot_download
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return asked

    return begin


def test_only_what_is_needed_is_downloaded(online: Callable[..., list[dict[str, Any]]]) -> None:
    asked = online(REPOSITORY)
    with smelt.load(f"{ID}@v1") as checkpoint:
        assert checkpoint.revision == COMMIT
    assert asked[0] == {"info": ID, "revision": "v1"}
    assert asked[1]["revision"] == "v1"
    assert asked[1]["allow_patterns"] == [
        "README.md", "chat_template.jinja", "config.json", "merges.txt", FILE, "tokenizer.json", "tokenizer.model",
        "weird[[]1].json",
    ]  # fmt: skip


def test_of_an_adapter_only_its_two_files_are_downloaded(online: Callable[..., list[dict[str, Any]]]) -> None:
    asked = online(["adapter_model.safetensors", "adapter_config.json", "README.md", "optimizer.pt"])
    with pytest.raises(smelt.InputRejected):  # the stand-in downloads nothing
        open_adapter(ID)
    (download,) = (call for call in asked if "download" in call)
    assert sorted(download["allow_patterns"]) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_model_is_not_downloaded_as_an_adapter(online: Callable[..., list[dict[str, Any]]]) -> None:
    online(["model.safetensors"])
    with pytest.raises(smelt.InputRejected, match="it is no adapter"):
        open_adapter(ID)


@pytest.mark.parametrize(
    ("files", "pattern"),
    [
        (
            ["pytorch_model.bin", "config.json"],
            "'owner/name' holds no safetensors file; 'pytorch_model.bin' is pickled",
        ),
        (["adapter_model.safetensors", "adapter_config.json"], "'owner/name' is an adapter, not a model"),
        (["model.gguf"], "'owner/name' holds GGUF"),
        (["unet/diffusion_pytorch_model.bin", "model_index.json"], "diffusers pipeline"),
        (
            ["unet/diffusion_pytorch_model.bin", "unet/config.json", "vae/model.safetensors", "model_index.json"],
            "'owner/name', 'unet', holds no safetensors file; 'diffusion_pytorch_model.bin' is pickled",
        ),
        ([], "holds no weights"),
    ],
)
def test_what_is_no_model_is_not_downloaded(
    online: Callable[..., list[dict[str, Any]]], files: list[str], pattern: str
) -> None:
    asked = online(files)
    with pytest.raises(smelt.InputRejected, match=pattern):
        smelt.load(ID)
    assert len(asked) == 1


def test_of_a_pipeline_the_folders_below_are_downloaded() -> None:
    unet = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "config.json", "sample.png"]
    names = [*(f"unet/{name}" for name in unet), "model_index.json", "unet/deep/model.safetensors", "whole.ckpt"]
    assert hub.wanted(names, "there") == ["model_index.json", "unet/config.json", f"unet/{unet[0]}"]
    assert hub.wanted([*names, "whole.safetensors"], "there")[-1] == "whole.safetensors"


def test_pickled_weights_are_downloaded_on_request() -> None:
    names = ["pytorch_model.bin", "training_args.bin", "config.json"]
    assert hub.wanted(names, "there", pickled=True) == ["config.json", "pytorch_model.bin"]
    assert hub.wanted([*names, FILE], "there", pickled=True) == ["config.json", FILE]


def response(status: int) -> Any:
    """As much of a response as the errors look at, whatever HTTP client is behind them."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "kind", "pattern"),
    [
        (lambda: errors.RepositoryNotFoundError("x", response=response(404)), smelt.InputRejected, "no hub repository"),
        (lambda: errors.RevisionNotFoundError("x", response=response(404)), smelt.InputRejected, "not this revision"),
        (lambda: errors.GatedRepoError("x", response=response(403)), smelt.InputRejected, "terms accepted"),
        (lambda: errors.HFValidationError("x"), smelt.InputRejected, "not a hub id"),
        (
            lambda: errors.HfHubHTTPError("a\nb", response=response(503)),
            smelt.OperationFailed,
            "download failed: 'a.nb'",
        ),
        (lambda: ConnectionError("x"), smelt.InputRejected, r"not in the local cache \(the hub cannot be reached\)"),
    ],
)
def test_errors_of_the_hub_become_one_line(
    online: Callable[..., list[dict[str, Any]]], error: Callable[[], Exception], kind: type[Exception], pattern: str
) -> None:
    online([], error())
    with pytest.raises(kind, match=rf"'owner/name@v1': .*{pattern}") as caught:
        smelt.load(ID, revision="v1", label="x")
    assert str(caught.value).isprintable()


def test_without_connection_the_cache_serves(cache: Path, online: Callable[..., list[dict[str, Any]]]) -> None:
    snapshot(cache, model=good("cached"))
    asked = online([], ConnectionError("no route"))
    with smelt.load(ID) as checkpoint:
        assert list(checkpoint) == ["cached"]
    assert asked[1]["local_files_only"]


def test_shards_are_wanted_with_their_index() -> None:
    assert hub.wanted([TWO, ONE, INDEX, "consolidated.00.pth", "other.safetensors"], "x") == sorted([ONE, TWO, INDEX])


def test_a_missing_home_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    with pytest.raises(smelt.InputRejected):
        smelt.load(os.path.join("~", "model"))

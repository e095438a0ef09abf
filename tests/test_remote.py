"""Models behind URLs: the same bits as from the disk, each byte fetched once, and servers that misbehave."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

import smelt
from smelt.checkpoint.remote import blocks, client, transport
from smelt.checkpoint.remote.store import Store
from smelt.errors import InputRejected, OperationFailed, SmeltError, UsageError, without_secrets
from tests.attacks import INDEX
from tests.readback import nothing_left
from tests.recipes import Family, recipe, save_shards
from tests.servers import Bucket, FileServer, Handler, serving, times

BLOCK = 16 << 10


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A cache of its own, small blocks, short pauses, and permission to use the network."""
    monkeypatch.setattr(blocks, "BLOCK", BLOCK)
    monkeypatch.setattr(blocks, "HEAD", 4 << 10)
    monkeypatch.setattr(transport, "PAUSES", [0.001] * 4)
    for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(switch, raising=False)
    return fresh_store(tmp_path / "blocks", monkeypatch)


def fresh_store(folder: Path, monkeypatch: pytest.MonkeyPatch, limit: int = 1 << 30) -> Store:
    folder.mkdir(exist_ok=True)
    made = Store(folder, limit)
    monkeypatch.setattr(blocks, "the_store", lambda: made)
    return made


@pytest.fixture
def server(family: Family) -> Iterator[FileServer]:
    with serving(family.folder) as found:
        yield found


def names(server: FileServer, family: Family, count: int = 3) -> list[str]:
    return [f"{server.url}/{Path(model).name}" for model in family.models[:count]]


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def read_all(url: str) -> dict[str, Any]:
    with smelt.load(url) as checkpoint:
        return {name: checkpoint[name] for name in checkpoint}


# --- right ----------------------------------------------------------------------------------------------


def test_a_merge_over_http_is_the_local_one_and_fetches_each_byte_once(
    server: FileServer, family: Family, tmp_path: Path
) -> None:
    """By a method of several passes; the side files travel too."""
    smelt.merge(recipe("ties", family.models, family.base, each={"density": 0.5}), tmp_path / "local")
    base = f"{server.url}/base"
    smelt.merge(recipe("ties", names(server, family), base, each={"density": 0.5}), tmp_path / "remote")
    assert same_weights(tmp_path / "local", tmp_path / "remote")
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    stored = sum((Path(model) / "model.safetensors").stat().st_size for model in (*family.models, family.base))
    assert stored <= server.sent() <= stored * 1.02
    requests = [path for path, _, _ in server.requests if path.endswith("/model.safetensors")]
    assert len(requests) <= stored / BLOCK + 4 * 4
    manifest = json.loads((tmp_path / "remote" / "smelt-manifest.json").read_text())
    assert [item["model"] for item in manifest["inputs"]] == [*names(server, family), base]


def test_shards_are_read_through_their_index(family: Family, tmp_path: Path) -> None:
    arrays = family.base_arrays
    halves = [dict(list(arrays.items())[:9]), dict(list(arrays.items())[9:])]
    save_shards(tmp_path / "model", halves)
    with serving(tmp_path) as server:
        for url in (f"{server.url}/model", f"{server.url}/model/{INDEX}"):
            found = read_all(url)
            assert all((found[name] == arrays[name]).all() for name in arrays)
            assert found.keys() == arrays.keys()


def test_opening_reads_headers_alone(server: FileServer, family: Family) -> None:
    with smelt.load(f"{server.url}/expert0/model.safetensors?download=true") as checkpoint:
        assert checkpoint.config["model_type"] == "llama"
        assert checkpoint.label == f"{server.url}/expert0/model.safetensors"
        assert checkpoint.scratch > 0
    assert server.sent() <= blocks.HEAD + 8192


def test_explain_check_and_inspect(server: FileServer, family: Family, capsys: pytest.CaptureFixture[str]) -> None:
    models = names(server, family, 2)
    plan = smelt.plan(recipe("linear", models))
    local = smelt.plan(recipe("linear", family.models[:2]))
    assert plan.peak_memory == local.peak_memory + blocks.SCRATCH
    plan.close()
    local.close()
    assert smelt.check(models).as_dict()["models"] is not None
    from smelt.cli import main

    main(["inspect", models[0]])
    assert "BF16" in capsys.readouterr().out


def test_threads_share_one_fetch_of_a_block(server: FileServer, family: Family) -> None:
    with smelt.load(names(server, family)[0]) as checkpoint:
        found: list[Any] = []
        workers = [threading.Thread(target=lambda: found.append(dict(checkpoint))) for _ in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert len(found) == 6
    assert all((each[name] == family.model_arrays[0][name]).all() for each in found for name in each)
    assert server.sent() <= (family.folder / "expert0/model.safetensors").stat().st_size * 1.05


def test_an_address_that_does_not_end_like_a_file(server: FileServer, family: Family) -> None:
    """It is tried as a folder first."""

    def rename(handler: Handler, first: int, last: int) -> bool:
        if handler.path != "/download/4711?type=model":
            return False
        data = Path(family.base, "model.safetensors").read_bytes()
        handler.serve(data, *handler.range(len(data)))
        return True

    server.rules.append(rename)
    found = read_all(f"{server.url}/download/4711?type=model")
    assert all((found[name] == family.base_arrays[name]).all() for name in family.base_arrays)
    with pytest.raises(InputRejected, match=r"/nothing' holds no weights: expected model.safetensors"):
        smelt.load(f"{server.url}/nothing")


def test_versions_that_cannot_be_told_apart(server: FileServer, family: Family, monkeypatch: Any) -> None:
    """It is told, and blocks serve that run alone."""
    monkeypatch.setattr(Handler, "facts", lambda self, data: {})
    for _ in range(2):
        server.requests.clear()
        with smelt.load(names(server, family)[0]) as checkpoint:
            assert any("a change would go unseen" in notice for notice in checkpoint.notices)
            _ = dict(checkpoint)
        assert server.sent() > 170_000


def test_runs_of_elements(server: FileServer, family: Family) -> None:
    name, starts = "model.embed_tokens.weight", np.array([0, 70, 5000])
    with smelt.load(names(server, family)[0]) as there, smelt.load(family.models[0]) as here:
        both = [np.empty((3, 64), np.uint16) for _ in range(2)]
        there.read_runs(name, starts, both[0])
        here.read_runs(name, starts, both[1])
    assert (both[0] == both[1]).all()


# --- the cache ------------------------------------------------------------------------------------------


def test_a_second_run_goes_on_where_the_first_was_cut_off(
    server: FileServer, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was fetched is not fetched again, by whatever process; a damaged block is."""
    url = names(server, family)[0]
    size = (family.folder / "expert0/model.safetensors").stat().st_size
    with smelt.load(url) as checkpoint:
        _ = checkpoint["lm_head.weight"]
    finished = [path for path in sorted((tmp_path / "blocks").iterdir()) if not path.name.startswith(".")]
    victim = next(path for path in finished if path.stat().st_size > 4096)
    victim.write_bytes(b"\0" * victim.stat().st_size)
    server.requests.clear()
    kept = fresh_store(tmp_path / "blocks", monkeypatch)._total
    assert kept > BLOCK
    found = read_all(url)
    assert all((found[name] == family.model_arrays[0][name]).all() for name in found)
    assert server.sent() <= size - kept + 2 * BLOCK + 2 * blocks.HEAD
    server.requests.clear()
    read_all(url)
    assert server.sent() <= blocks.HEAD + 1


READER = f"""
import sys, smelt
from smelt.checkpoint.remote import blocks
blocks.BLOCK, blocks.HEAD = {BLOCK}, 4096
with smelt.load(sys.argv[1]) as checkpoint:
    dict(checkpoint)
"""


def test_a_killed_process_leaves_what_it_fetched(server: FileServer, family: Family, tmp_path: Path) -> None:
    """The server stops answering after some blocks; the process is killed; the next one needs the rest alone."""
    environment = {**os.environ, "SMELT_CACHE": str(tmp_path / "cache")}
    command, held = [sys.executable, "-c", READER, names(server, family)[0]], threading.Event()
    stuck = threading.Event()

    def hold(handler: Handler, first: int, last: int) -> bool:
        if first < 6 * BLOCK:
            return False
        stuck.set()
        held.wait(20)
        return True

    server.rules.append(hold)
    with subprocess.Popen(command, env=environment) as process:
        assert stuck.wait(20)
        time.sleep(0.2)
        process.kill()
    kept = sum(path.stat().st_size for path in (tmp_path / "cache/blocks").iterdir())
    held.set()
    server.rules.clear()
    server.requests.clear()
    subprocess.run(command, env=environment, check=True)
    size = (family.folder / "expert0/model.safetensors").stat().st_size
    assert kept > 3 * BLOCK
    assert server.sent() <= size - kept + 2 * blocks.HEAD


def test_the_cache_is_bounded(server: FileServer, family: Family, tmp_path: Path, monkeypatch: Any) -> None:
    small = fresh_store(tmp_path / "few", monkeypatch, limit=5 * BLOCK)
    found = read_all(names(server, family)[0])
    assert all((found[name] == family.model_arrays[0][name]).all() for name in found)
    there = sum(path.stat().st_size for path in (tmp_path / "few").iterdir())
    assert 0 < there == small._total <= 5 * BLOCK


def test_the_size_of_the_cache_must_be_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    from smelt.checkpoint.remote.store import the_store

    monkeypatch.setenv("SMELT_CACHE_GB", "much")
    with pytest.raises(UsageError, match="expected a number of gigabytes"):
        the_store()


# --- servers that fail for a while ----------------------------------------------------------------------


def busy(handler: Handler, first: int, last: int) -> bool:
    handler.answer(503, b"", {"Retry-After": "0"})
    return True


def hang_up(handler: Handler, first: int, last: int) -> bool:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True
    return True


def half(handler: Handler, first: int, last: int) -> bool:
    """Half of the bytes, then the end of the connection."""
    data = (handler.server.root / handler.path.split("?")[0].lstrip("/")).read_bytes()
    part = data[first : last + 1]
    handler.send_response(206)
    for name, value in handler.facts(data).items():
        handler.send_header(name, value)
    handler.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
    handler.send_header("Content-Length", str(len(part)))
    handler.end_headers()
    handler.wfile.write(part[: len(part) // 2])
    handler.close_connection = True
    return True


def late(handler: Handler, first: int, last: int) -> bool:
    time.sleep(0.4)
    return hang_up(handler, first, last)


def unreliable(handler: Handler, first: int, last: int) -> bool:
    """The answer is right, but the connection ends although nothing says so."""
    handler.close_connection = True
    return False


@pytest.mark.parametrize("rule", [busy, hang_up, half, late, unreliable])
def test_what_fails_for_a_while_is_tried_again(
    server: FileServer, family: Family, monkeypatch: pytest.MonkeyPatch, rule: Any
) -> None:
    monkeypatch.setattr(client, "TIMEOUT", 0.2)
    server.rules.append(times(100 if rule is unreliable else 4, rule))
    found = read_all(names(server, family)[0])
    assert all((found[name] == family.model_arrays[0][name]).all() for name in found)


@pytest.mark.parametrize(("rule", "said"), [(busy, "answered 503"), (hang_up, "RemoteDisconnected")])
def test_what_fails_for_good_is_told(server: FileServer, family: Family, tmp_path: Path, rule: Any, said: str) -> None:
    def weights(handler: Handler, first: int, last: int) -> bool:
        return first > 0 and "Range" in handler.headers and rule(handler, first, last)

    server.rules.append(weights)
    with pytest.raises(OperationFailed, match=rf"expert0/model.safetensors.*{said}.*5 times in a row"):
        smelt.merge(recipe("linear", names(server, family)), tmp_path / "out")
    assert nothing_left(tmp_path / "out")


# --- servers that are not to be trusted -----------------------------------------------------------------


def answering(server: FileServer, status: int, data: bytes, headers: dict[str, str], start: int = 0) -> None:
    """Answer like this to ranges of weights from ``start`` on."""

    def rule(handler: Handler, first: int, last: int) -> bool:
        if "Range" not in handler.headers or first < start:
            return False
        handler.answer(status, data, headers)
        return True

    server.rules.append(rule)


@pytest.mark.parametrize(
    ("status", "headers", "start", "said"),
    [
        (200, {}, 0, "serves no ranges: download the file and give its path"),
        (206, {"Content-Range": "bytes 5-9/1000"}, 0, "answered 'bytes 5-9/1000'"),
        (206, {"Content-Range": "bytes 0-9999999/9999999999"}, 0, "asked for 4096 bytes from 0 on"),
        (206, {"Content-Range": "bytes 0-4095/*"}, 0, "answered"),
        (206, {}, 0, "answered 'no range'"),
        (206, {"Content-Range": "bytes 0-99/1000", "Content-Encoding": "gzip"}, 0, "answered"),
        (416, {"Content-Range": "bytes */10"}, 4096, "changed while it was being read"),
        (404, {}, 4096, "changed while it was being read .it is gone"),
        (404, {}, 0, "no such file .404."),
        (403, {}, 0, "access refused .403."),
        (418, {}, 0, "answered 418"),
    ],
)
def test_wrong_answers(
    server: FileServer, family: Family, status: int, headers: dict[str, str], start: int, said: str
) -> None:
    answering(server, status, b"x" * 4096, headers, start)
    with pytest.raises(SmeltError, match=said):
        read_all(f"{server.url}/expert0/model.safetensors")


@pytest.mark.parametrize("when", ["between", "at the end"])
def test_a_file_that_changes_while_it_is_read(family: Family, tmp_path: Path, when: str) -> None:
    """Its tag is compared with every answer, and once more before anything is published."""
    shutil.copytree(family.folder, tmp_path / "models")
    file = tmp_path / "models/expert1/model.safetensors"
    with serving(tmp_path / "models") as server:

        def rule(handler: Handler, first: int, last: int) -> bool:
            size = file.stat().st_size
            if "expert1" in handler.path and (first > 0 if when == "between" else last == size - 1):
                server.rules.clear()
                if when == "at the end":
                    handler.serve(file.read_bytes(), first, last)
                file.write_bytes(file.read_bytes()[:-2] + b"\0\0")
                return when == "at the end"
            return False

        server.rules.append(rule)
        with pytest.raises(OperationFailed, match=r"expert1/model.safetensors' changed while it was being read"):
            smelt.merge(recipe("linear", names(server, family)), tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_a_truncated_file_is_told_by_its_header(family: Family, tmp_path: Path) -> None:
    shutil.copytree(family.models[0], tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with serving(tmp_path) as server, pytest.raises(InputRejected, match=r"cut short"):
        smelt.load(f"{server.url}/model")


def test_names_are_quoted_in_urls(family: Family, tmp_path: Path) -> None:
    """What a name holds is never read as part of a URL."""
    (tmp_path / "it").mkdir()
    shutil.copy(family.folder / "base/model.safetensors", tmp_path / "it/a b%2F..%2F?é.safetensors")
    (tmp_path / "it" / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(family.base_arrays, "a b%2F..%2F?é.safetensors")})
    )
    with serving(tmp_path) as server:
        assert len(read_all(f"{server.url}/it")) == len(family.base_arrays)
        found = read_all(f"{server.url}/it/a%20b%252F..%252F%3F%C3%A9.safetensors")
        assert len(found) == len(family.base_arrays)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "https://h/x.safetensors", "a.bin", 7])
def test_an_index_names_files_of_its_folder_alone(tmp_path: Path, name: object) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    with serving(tmp_path) as server:
        with pytest.raises(InputRejected, match="weight_map sends 'w' to"):
            smelt.load(server.url)
        assert [path for path, _, _ in server.requests if "x.saf" in path] == []


def test_a_shard_that_is_missing(family: Family, tmp_path: Path) -> None:
    save_shards(tmp_path / "model", [dict(list(family.base_arrays.items())[:9]), {"w": np.zeros(3, np.float32)}])
    (tmp_path / "model/model-00002-of-00002.safetensors").unlink()
    with serving(tmp_path) as server, pytest.raises(InputRejected, match=r"00002-of-00002.safetensors': no such file"):
        smelt.load(f"{server.url}/model")


def test_side_files_are_bounded(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smelt.checkpoint import place

    monkeypatch.setattr(place, "MAX_BYTES", 100)
    with serving(family.folder) as server, pytest.raises(InputRejected, match=r"config.json' has more than 100 bytes"):
        smelt.load(f"{server.url}/expert0")


# --- redirects and credentials --------------------------------------------------------------------------


def redirecting(target: str) -> Any:
    def rule(handler: Handler, first: int, last: int) -> bool:
        handler.answer(302, b"", {"Location": target + handler.path})
        return True

    return rule


def test_credentials_stay_with_their_host(server: FileServer, family: Family, tmp_path: Path) -> None:
    """A redirect to another port of this machine is followed, without them; no output holds them."""
    with serving(tmp_path) as front:
        front.rules.append(redirecting(server.url))
        own = front.url.replace("http://", "http://ann:geheim@")
        models = [f"{own}/expert{i}/model.safetensors?sig=wahrlich" for i in (0, 1)]
        smelt.merge(recipe("linear", models), tmp_path / "out")
        assert {*front.secrets} == {"Basic YW5uOmdlaGVpbQ=="}
    assert {*server.secrets} == {None}
    smelt.merge(recipe("linear", family.models[:2]), tmp_path / "local")
    assert same_weights(tmp_path / "local", tmp_path / "out")
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".md"))
    assert b"geheim" not in written
    assert b"wahrlich" not in written
    with pytest.raises(SmeltError) as caught:
        smelt.plan(recipe("linear", models))
    assert "geheim" not in str(caught.value)
    assert "wahrlich" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "said"),
    [("ftp://127.0.0.1", "only https"), ("file://", "only https"), ("http://example.org", "use https")],
)
def test_redirects_to_anything_but_https_are_refused(server: FileServer, target: str, said: str) -> None:
    server.rules.append(redirecting(target))
    with pytest.raises(InputRejected, match=said):
        smelt.load(f"{server.url}/expert0/model.safetensors")


def test_redirects_end(server: FileServer) -> None:
    server.rules.append(redirecting(""))
    with pytest.raises(InputRejected, match="redirected more than 5 times"):
        smelt.load(f"{server.url}/expert0/model.safetensors")


def test_redirects_from_outside_into_this_network_are_refused() -> None:
    for target in ("https://127.0.0.1/x", "https://10.1.2.3/", "https://[::1]/", "https://169.254.169.254/meta"):
        with pytest.raises(InputRejected, match="private address"):
            client._redirected("https://example.org/a", target)
    with pytest.raises(InputRejected, match="only https"):
        client._redirected("https://example.org/a", "http://example.org/b")
    assert client._redirected("https://a.org/x/y", "../z") == "https://a.org/z"


def test_addresses_that_expire_are_asked_for_again(server: FileServer, family: Family, tmp_path: Path) -> None:
    """Each one that the front door hands out is good for six requests."""
    handed: list[int] = []

    def expiring(handler: Handler, first: int, last: int) -> bool:
        handed[-1] += 1
        if handed[-1] > 6:
            handler.answer(403)
        return handed[-1] > 6

    def front_door(handler: Handler, first: int, last: int) -> bool:
        handed.append(0)
        return redirecting(server.url)(handler, first, last)  # type: ignore[no-any-return]

    server.rules.append(expiring)
    with serving(tmp_path) as front:
        front.rules.append(front_door)
        found = read_all(f"{front.url}/expert0/model.safetensors")
    assert all((found[name] == family.model_arrays[0][name]).all() for name in found)
    assert len(handed) < len(server.requests)


def test_https_wants_a_certificate_that_is_trusted(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]  # fmt: skip
    if shutil.which("openssl") is None or subprocess.run(made, capture_output=True, check=False).returncode:
        pytest.skip("needs openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("NO_PROXY", "localhost")
    with serving(family.folder, tls=context) as server:
        url = f"https://localhost:{server.server_address[1]}/expert0"
        client._tls.cache_clear()
        with pytest.raises(InputRejected, match="its certificate is not valid"):
            smelt.load(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        client._tls.cache_clear()
        assert len(read_all(url)) == len(family.base_arrays)
    client._tls.cache_clear()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://h/a%2Fb.safetensors", "no plain name"),
        ("http://example.org/model", "http can be read and changed on the way: use https"),
        ("https:///model", "names no host"),
        ("https://a:99999/model", "Port out of range"),
        ("https://h/a b", "must be escaped"),
        ("https://h/ä", "must be escaped"),
        ("https://h/'a", "must be escaped"),
        ("hf://owner", "expected hf://owner/name"),
        ("hf://a/b/c/d", "expected hf://owner/name"),
        ("file:///etc/model", "file:// is not read"),
        ("zip://a::https://h/x", "zip:// is not read"),
        ("nosuch://h/model", "nosuch"),
    ],
)
def test_urls_that_are_refused(url: str, said: str) -> None:
    with pytest.raises(SmeltError, match=said):
        smelt.load(url)


@pytest.mark.parametrize("url", ["hf://owner/name", "https://example.org/m", "s3://bucket/m", "http://127.0.0.1:1/m"])
def test_offline_means_no_network(monkeypatch: pytest.MonkeyPatch, url: str, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "socket", None)
    with pytest.raises(InputRejected, match="HF_HUB_OFFLINE is set"):
        smelt.load(url)


def test_offline_the_hub_is_what_its_cache_holds(
    family: Family, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    home = tmp_path / "hub/models--owner--name"
    shutil.copytree(family.base, home / "snapshots" / COMMIT)
    (home / "refs").mkdir()
    (home / "refs/main").write_text(COMMIT)
    for url in ("hf://owner/name", "hf://owner/name@main/model.safetensors"):
        with smelt.load(url) as checkpoint:
            assert (checkpoint.revision, len(checkpoint)) == (COMMIT, len(family.base_arrays))


def test_secrets_are_cut_from_urls_in_any_text() -> None:
    text = "see 'https://u:p@h/a?k=1', s3://key:x@b/c and hf://o/n@main."
    assert without_secrets(text) == "see 'https://h/a', s3://b/c and hf://o/n@main."


def test_two_queries_are_two_models(server: FileServer, family: Family) -> None:
    """They may lead to different files, so neither stands for the other."""
    models = [f"{server.url}/expert0/model.safetensors?{query}" for query in ("id=1", "id=2")]
    plan = smelt.plan(recipe("linear", models))
    labels = [item.label for item in plan.inputs]
    plan.close()
    assert len({*labels}) == 2
    assert not any("id=" in label for label in labels)


# --- the hub --------------------------------------------------------------------------------------------

COMMIT = "0" * 39 + "a"


@pytest.fixture
def hub(server: FileServer, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A hub that serves the family as owner/<name>: small files itself, weights from another host."""

    class Api:
        def __init__(self, endpoint: str | None = None) -> None:
            assert endpoint == front.url

        def model_info(self, repository: str, revision: str | None = None) -> Any:
            assert revision in (None, "main")
            folder = family.folder / repository.split("/")[1]
            files = [SimpleNamespace(rfilename=path.name) for path in folder.iterdir()]
            return SimpleNamespace(sha=COMMIT, siblings=[*files, SimpleNamespace(rfilename="onnx/model.safetensors")])

    def resolve(handler: Handler, first: int, last: int) -> bool:
        _, owner, name, what, commit, file = handler.path.split("/")
        assert (owner, what, commit) == ("owner", "resolve", COMMIT)
        if file.endswith(".safetensors"):
            handler.answer(302, b"", {"Location": f"{server.url}/{name}/{file}"})
        else:
            handler.answer(200, (family.folder / name / file).read_bytes())
        return True

    with serving(tmp_path) as front:
        front.rules.append(resolve)
        monkeypatch.setattr(constants, "ENDPOINT", front.url)
        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_geheim")
        monkeypatch.setattr(
            huggingface_hub, "hf_hub_url",
            lambda repository, name, revision, endpoint: f"{endpoint}/{repository}/resolve/{revision}/{name}",
        )  # fmt: skip
        yield front


def test_a_merge_from_the_hub_is_pinned(hub: FileServer, server: FileServer, family: Family, tmp_path: Path) -> None:
    models = ["hf://owner/expert0@main", "hf://owner/expert1/model.safetensors", "hf://owner/expert2"]
    smelt.merge(recipe("linear", models), tmp_path / "hub-out")
    smelt.merge(recipe("linear", family.models), tmp_path / "local")
    assert same_weights(tmp_path / "local", tmp_path / "hub-out")
    manifest = json.loads((tmp_path / "hub-out/smelt-manifest.json").read_text())
    assert [(item["model"], item["revision"]) for item in manifest["inputs"]] == [(name, COMMIT) for name in models]
    card = (tmp_path / "hub-out/README.md").read_text()
    assert "- owner/expert0@main\n- owner/expert2\nbase_model_relation" in card
    assert {*hub.secrets} == {"Bearer hf_geheim"}
    assert {*server.secrets} == {None}
    stored = sum((Path(model) / "model.safetensors").stat().st_size for model in family.models)
    assert server.sent() <= 1.05 * stored
    assert len([path for path, _, _ in hub.requests if path.endswith(".safetensors")]) <= 6, "each block asks the hub"


def test_a_tokenizer_from_the_hub(hub: FileServer, family: Family, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    tree = recipe("linear", family.models[:2], tokenizer_source="hf://owner/expert0")
    smelt.merge(tree, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_a_file_that_the_repository_lacks(hub: FileServer) -> None:
    with pytest.raises(InputRejected, match="the repository has no such file"):
        smelt.load("hf://owner/expert0/other.safetensors")


# --- fsspec ---------------------------------------------------------------------------------------------


def in_memory(folder: Path, home: str) -> Any:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for path in folder.iterdir():
        system.pipe_file(f"{home}/{path.name}", path.read_bytes())
    return system


def test_whatever_fsspec_reaches(family: Family, tmp_path: Path) -> None:
    for i, model in enumerate(family.models):
        system = in_memory(Path(model), f"/shop/expert{i}")
    urls = ["memory://shop/expert0", "memory://shop/expert1/model.safetensors", "memory://shop/expert2/"]
    smelt.merge(recipe("linear", urls), tmp_path / "remote")
    smelt.merge(recipe("linear", family.models), tmp_path / "local")
    assert same_weights(tmp_path / "local", tmp_path / "remote")
    with smelt.load(urls[0]) as checkpoint:
        system.pipe_file("/shop/expert0/model.safetensors", b"x" * 10)
        with pytest.raises(OperationFailed, match=r"changed while it was being read .from \d+ to 10 bytes"):
            checkpoint.check_unchanged()
    for url, said in ((urls[0] + "9", "no such file"), ("memory://shop/expert1/a.safetensors", "no such file")):
        with pytest.raises(InputRejected, match=said):
            smelt.load(url)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")

    def lacking(url: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lacking)
    with pytest.raises(UsageError, match=r"s3:// needs an optional dependency: pip install 'smelt\[remote\]'"):
        smelt.load("s3://bucket/model")
    with pytest.raises(UsageError, match=r"gs:// needs an optional dependency.*gcsfs"):
        smelt.load("gs://bucket/model")


def test_s3(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder by listing, a file by its key, through s3fs, from a server that speaks as much S3 as that takes."""
    pytest.importorskip("s3fs")
    shutil.copytree(family.folder, tmp_path / "root/shop/models")
    with serving(tmp_path / "root", Bucket) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheim")
        urls = [f"s3://shop/models/expert{i}" for i in range(2)] + ["s3://shop/models/expert2/model.safetensors"]
        smelt.merge(recipe("linear", urls), tmp_path / "remote")
        stored = sum((Path(model) / "model.safetensors").stat().st_size for model in family.models)
        assert server.sent() <= 1.06 * stored
        with pytest.raises(InputRejected, match="no such file or folder"):
            smelt.load("s3://shop/models/nobody")
    smelt.merge(recipe("linear", family.models), tmp_path / "local")
    assert same_weights(tmp_path / "local", tmp_path / "remote")


def test_s3_as_moto_speaks_it(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same from a server that somebody else wrote; uploaded by Amazon's own client."""
    moto, boto3 = pytest.importorskip("moto.server"), pytest.importorskip("boto3")
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # which knows the server of another test
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheim")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="shop")
        for path in filter(Path.is_file, family.folder.rglob("*")):
            client.upload_file(str(path), "shop", str(path.relative_to(family.folder)))
        urls = [f"s3://shop/{Path(model).relative_to(family.folder)}" for model in family.models]
        smelt.merge(recipe("linear", urls), tmp_path / "remote")
    finally:
        server.stop()
    smelt.merge(recipe("linear", family.models), tmp_path / "local")
    assert same_weights(tmp_path / "local", tmp_path / "remote")

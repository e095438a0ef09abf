"""The seam to the file system: what it promises, and that nothing goes around it."""

from __future__ import annotations

import ast
import errno
import os
import random
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import smelt
from smelt import storage

SOURCE = Path(smelt.__file__).parent


def failing(code: int) -> Callable[..., int]:
    def fail(*arguments: object, **options: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


# --- nothing goes around it -----------------------------------------------------------------------------

_OF_OS = {
    "rename", "replace", "remove", "unlink", "mkdir", "makedirs", "rmdir", "listdir", "scandir", "truncate", "fsync",
    "pread", "preadv", "pwrite", "read", "write", "link", "symlink",
}  # fmt: skip
_OF_PATHS = {
    "read_text",
    "read_bytes",
    "write_text",
    "write_bytes",
    "iterdir",
    "unlink",
    "rmdir",
    "touch",
    "symlink_to",
}


def _accesses(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
            yield "open"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            yield from sorted(modules & {"shutil", "mmap", "io"})
        if isinstance(node, ast.Attribute):
            of_os = isinstance(node.value, ast.Name) and node.value.id == "os" and node.attr in _OF_OS
            if of_os or node.attr in _OF_PATHS:
                yield node.attr


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_are_touched_in_one_module_only(path: Path) -> None:
    found = list(_accesses(ast.parse(path.read_text())))
    assert bool(found) == (path.name == "storage.py"), found


# --- reading and writing --------------------------------------------------------------------------------


@given(st.binary(max_size=2000), st.integers(0, 2**31))
def test_short_writes_and_reads_lose_nothing(tmp_path_factory: pytest.TempPathFactory, data: bytes, seed: int) -> None:
    path = tmp_path_factory.mktemp("short") / "file"
    luck, read, write = random.Random(seed), os.preadv, os.pwrite
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, part, at: write(fd, part[: luck.randint(1, 100)], at))
        patch.setattr(os, "preadv", lambda fd, parts, at: read(fd, [parts[0][: luck.randint(1, 100)]], at))
        storage.write_small(path, data)
        assert storage.read_small(path, 2000) == data
    assert path.read_bytes() == data


def test_small_files_have_a_limit(tmp_path: Path) -> None:
    storage.write_small(tmp_path / "file", bytes(11))
    assert storage.read_small(tmp_path / "file", 11) == bytes(11)
    with pytest.raises(smelt.InputRejected, match="11 bytes, at most 10"):
        storage.read_small(tmp_path / "file", 10)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    storage.write_small(tmp_path / "file", b"first")
    with pytest.raises(smelt.OperationFailed, match="File exists"):
        storage.write_small(tmp_path / "file", b"second")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(smelt.OperationFailed, match="File exists"):
        storage.write_small(tmp_path / "link", b"second")
    assert storage.listdir(tmp_path) == ["file", "link"]


def test_space_is_reserved(tmp_path: Path) -> None:
    storage.close(storage.create(tmp_path / "file", 100_000))
    facts = (tmp_path / "file").stat()
    assert facts.st_size == 100_000
    assert facts.st_blocks * 512 >= 100_000


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_what_cannot_be_reserved_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(code))
    with pytest.raises(smelt.OperationFailed, match=re.escape(os.strerror(code))) as caught:
        storage.create(tmp_path / "file", 1234)
    assert str(tmp_path / "file") in str(caught.value)
    assert ("1234 bytes needed" in str(caught.value)) == (code != errno.EIO)
    assert storage.listdir(tmp_path) == []


def test_hints_never_fail(tmp_path: Path) -> None:
    fd = storage.create(tmp_path / "file", 100)
    storage.start_writeback(fd, 0, 0)
    storage.advise_willneed(fd, 0, 100)
    storage.close(fd)
    for call in (storage.start_writeback, storage.advise_willneed):
        call(fd, 0, 100)
    storage.close(fd)


CALLS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "open_read": ("open", storage.open_read),
    "listdir": ("listdir", storage.listdir),
    "ensure_folder": ("mkdir", storage.ensure_folder),
    "lock_folder": ("mkdir", lambda path: storage.lock_folder(path, b"")),
    "reopen": ("open", lambda path: storage.reopen(path, 0)),
    "identity": ("stat", storage.identity),
    "free_bytes": ("statvfs", storage.free_bytes),
    "fsync_directory": ("fsync", storage.fsync_directory),
    "fsync": ("fsync", lambda path: storage.fsync(0, path)),
    "pread_into": ("preadv", lambda path: storage.pread_into(0, memoryview(bytearray(4)), 0, path)),
    "pwrite_all": ("pwrite", lambda path: storage.pwrite_all(1, memoryview(b"text"), 0, path)),
    "create": ("open", storage.create),
    "remove_tree": ("rmdir", storage.remove_tree),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENOMEM])
def test_every_failure_is_told_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    broken, call = CALLS[name]
    with monkeypatch.context() as patch:
        patch.setattr(os, broken, failing(code))
        with pytest.raises(smelt.OperationFailed, match=re.escape(os.strerror(code))) as caught:
            call(tmp_path)
    assert repr(str(tmp_path)) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_long_and_odd_paths_stay_readable(tmp_path: Path) -> None:
    path = tmp_path / ("long" * 50) / "new\nline\x1b[2J"
    with pytest.raises(smelt.OperationFailed, match=r"new\\nline\\x1b\[2J") as caught:
        storage.open_read(path)
    assert str(caught.value).isprintable()


# --- publication ----------------------------------------------------------------------------------------


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    folder = tmp_path / "out.staging"
    folder.mkdir()
    (folder / "weights").write_bytes(b"new")
    return folder


@pytest.fixture(params=["renameat2", "rename"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to publish: where the system can refuse by itself, and where it cannot."""
    if request.param == "rename":
        monkeypatch.setattr(storage, "_libc_function", lambda *arguments: None)
    return str(request.param)


@pytest.mark.parametrize("empty", [False, True])
def test_a_folder_is_published_whole(staging: Path, tmp_path: Path, way: str, empty: bool) -> None:
    out = tmp_path / "out"
    if empty:
        out.mkdir()
    storage.publish_directory(staging, out)
    assert storage.listdir(tmp_path) == ["out"]
    assert (out / "weights").read_bytes() == b"new"


@pytest.mark.parametrize("there", ["folder", "file", "link", "link to an empty folder"])
def test_what_is_there_stays(staging: Path, tmp_path: Path, way: str, there: str) -> None:
    out = tmp_path / "out"
    if there == "folder":
        out.mkdir()
        (out / "weights").write_bytes(b"old")
    elif there == "file":
        out.write_bytes(b"old")
    elif there == "link":
        out.symlink_to("nowhere")
    else:
        (tmp_path / "empty").mkdir()
        out.symlink_to("empty")
    before = (out.lstat(), storage.listdir(out) if there == "folder" else None)
    with pytest.raises(smelt.InputRejected, match=r"/out' exists and is not an empty folder"):
        storage.publish_directory(staging, out)
    assert (out.lstat(), storage.listdir(out) if there == "folder" else None) == before
    assert (staging / "weights").read_bytes() == b"new"


def test_of_many_runs_to_one_place_one_wins(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stagings = [tmp_path / f"staging{number}" for number in range(8)]
    for folder in stagings:
        folder.mkdir()
        (folder / "weights").write_bytes(folder.name.encode())

    def publish(folder: Path) -> bool:
        try:
            storage.publish_directory(folder, out)
        except smelt.InputRejected:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(publish, stagings))
    assert won.count(True) == 1
    assert (out / "weights").read_bytes() == stagings[won.index(True)].name.encode()
    assert len(storage.listdir(tmp_path)) == 8


def test_the_folder_is_on_disk_before_and_after_its_name(
    staging: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync = os.fsync

    def recorded(fd: int) -> None:
        name = "staging" if os.path.samestat(os.fstat(fd), inode) else "parent"
        events.append(f"{name}, {'published' if (tmp_path / 'out').exists() else 'hidden'}")
        sync(fd)

    inode = staging.stat()
    monkeypatch.setattr(os, "fsync", recorded)
    storage.publish_directory(staging, tmp_path / "out")
    assert events == ["staging, hidden", "parent, published", "parent, published"], "both parents, here the same"


def test_a_folder_that_cannot_be_flushed_is_not_published(
    staging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(smelt.OperationFailed, match="Input/output error"):
        storage.publish_directory(staging, tmp_path / "out")
    assert storage.listdir(tmp_path) == [staging.name]


def test_trees_are_removed_but_links_are_not_followed(tmp_path: Path) -> None:
    kept, tree = tmp_path / "kept", tmp_path / "tree"
    (tree / "inner").mkdir(parents=True)
    kept.mkdir()
    (kept / "file").write_bytes(b"")
    (tree / "link").symlink_to(kept)
    storage.remove_tree(tree)
    storage.remove_tree(tree)
    assert storage.listdir(tmp_path) == ["kept"]
    assert storage.listdir(kept) == ["file"]


def test_caches_are_written_once_and_whole(tmp_path: Path) -> None:
    storage.write_atomically(tmp_path / "file", b"first")
    storage.write_atomically(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert storage.listdir(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "scandir", failing(errno.EIO))
    for look in (storage.files_below, storage.allocated):
        with pytest.raises(smelt.OperationFailed, match="Input/output error"):
            look(tmp_path)

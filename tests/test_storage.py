"""The seam to the file system: what it promises, and that nothing goes around it."""

from __future__ import annotations

import ast
import errno
import fcntl
import os
import random
import re
import shutil
import signal
import socket
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


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 2**31))
def test_runs_are_read_whatever_single_reads_return(
    tmp_path_factory: pytest.TempPathFactory, runs: int, length: int, seed: int
) -> None:
    path, data, luck = tmp_path_factory.mktemp("runs") / "file", bytes(range(256)), random.Random(seed)
    path.write_bytes(data)
    read, descriptor = os.preadv, storage.open_read(path)
    offsets, out = [luck.randrange(256 - length) for _ in range(runs)], bytearray(runs * length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", lambda fd, parts, at: read(fd, [parts[0][: luck.randint(1, 9)]], at))
        storage.pread_runs(descriptor, memoryview(out), offsets, path)
    storage.close(descriptor)
    assert out == b"".join(data[offset : offset + length] for offset in offsets)


def test_a_file_that_ends_early_is_told_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    descriptor = storage.open_read(tmp_path / "file")
    with pytest.raises(smelt.OperationFailed, match=r"/file' ends early: no byte at offset 10, 3 more were expected"):
        storage.pread_into(descriptor, memoryview(bytearray(8)), 5, tmp_path / "file")
    storage.close(descriptor)


@pytest.mark.parametrize("kind", ["socket", "pipe", "folder", "device"])
def test_only_regular_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket may not be long
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("it")
    elif kind != "device":
        os.mkfifo("it") if kind == "pipe" else os.mkdir("it")
    before = os.listdir("/proc/self/fd")
    for _ in range(2):
        with pytest.raises(smelt.InputRejected, match="is not a regular file"):
            storage.read_small(Path("/dev/null" if kind == "device" else "it"), 10)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("size", [0, 1, 9, 10, 25, 30])
def test_pieces_and_beginnings_of_a_file(tmp_path: Path, size: int) -> None:
    data = bytes(range(size))
    (tmp_path / "file").write_bytes(data)
    found = [bytes(piece) for piece in storage.pieces(tmp_path / "file", 10)]
    assert found == [data[at : at + 10] for at in range(0, size, 10)]
    assert storage.read_start(tmp_path / "file", 10) == data[:10]


def test_a_stretch_is_read_as_a_file() -> None:
    data = random.Random(0).randbytes(50_000)

    def read_into(out: memoryview, offset: int) -> None:
        out[:] = data[offset : offset + len(out)]

    with storage.stretch(read_into, 123, 40_000) as file:
        assert file.read(7) == data[123:130]
        assert file.read() == data[130:40_123]
        assert file.read(1) == b""


def test_what_is_appended_comes_last_and_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    storage.write_small(tmp_path / "file", b"first")
    descriptor = storage.reopen(tmp_path / "file", 5)
    storage.append(descriptor, b" second", tmp_path / "file")
    storage.truncate(descriptor, 8, tmp_path / "file")
    storage.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"first se"
    assert synced == [5, 12]


@pytest.mark.parametrize("allocating", [True, False])
def test_a_file_taken_up_again_has_the_size_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allocating: bool
) -> None:
    if not allocating:
        monkeypatch.delattr(os, "posix_fallocate")
    (tmp_path / "file").write_bytes(b"long ago")
    for size, content in ((4, b"long"), (6, b"long\0\0"), (0, b"")):
        storage.close(storage.reopen(tmp_path / "file", size))
        assert (tmp_path / "file").read_bytes() == content
    storage.close(storage.reopen(tmp_path / "gone", 3))
    assert (tmp_path / "gone").read_bytes() == bytes(3)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(smelt.OperationFailed, match=r"cannot open .*/link'"):
        storage.reopen(tmp_path / "link", 0)


def test_scratch_files_have_no_name(tmp_path: Path) -> None:
    descriptor = storage.unnamed(tmp_path)
    storage.pwrite_all(descriptor, memoryview(b"text"), 10)
    assert os.pread(descriptor, 20, 0) == bytes(10) + b"text"
    assert storage.listdir(tmp_path) == []
    storage.close(descriptor)


def test_a_file_is_known_by_where_it_lies_its_size_and_its_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(7))
    os.utime(tmp_path / "file", ns=(1, 123_456_789))
    facts = os.stat(tmp_path / "file")
    found = storage.identity(tmp_path / "file")
    assert found == storage.FileIdentity(tmp_path / "file", facts.st_dev, facts.st_ino, 7, 123_456_789)


def test_folders_are_made_listed_and_measured(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        storage.ensure_folder(tmp_path / "open")
        storage.make_folders(tmp_path / "open" / "private")
        storage.make_way(tmp_path / "open" / "way" / "file")
    finally:
        os.umask(before)
    storage.ensure_folder(tmp_path / "open")
    storage.make_folders(tmp_path / "open" / "private")
    modes = {name: (tmp_path / "open" / name).stat().st_mode & 0o777 for name in ("", "private", "way")}
    assert modes == {"": 0o777, "private": 0o700, "way": 0o777}
    for name in ("z", "private/b", "private/a"):
        storage.write_small(tmp_path / "open" / name, bytes(5000))
    assert storage.files_below(tmp_path / "open") == ["private/a", "private/b", "z"]
    assert storage.allocated(tmp_path / "open") == 3 * 512 * os.stat(tmp_path / "open" / "z").st_blocks
    assert storage.allocated(tmp_path / "nowhere") == 0
    assert storage.modified(tmp_path / "open" / "z") == os.stat(tmp_path / "open" / "z").st_mtime
    assert storage.free_bytes(tmp_path) == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
    with pytest.raises(smelt.OperationFailed, match="Not a directory"):
        storage.fsync_directory(tmp_path / "open" / "z")


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


def test_hints_name_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[object, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: told.append(arguments))
    monkeypatch.setattr(storage, "_libc_function", lambda *signature: lambda *arguments: told.append(arguments))
    storage.advise_willneed(3, 40, 500)
    storage.start_writeback(3, 40, 500)
    assert told == [(3, 40, 500, os.POSIX_FADV_WILLNEED), (3, 40, 500, 2)]


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
    "pread_runs": ("preadv", lambda path: storage.pread_runs(0, memoryview(bytearray(4)), [0], path)),
    "append": ("fstat", lambda path: storage.append(0, b"text", path)),
    "truncate": ("ftruncate", lambda path: storage.truncate(0, 0, path)),
    "unnamed": ("open", storage.unnamed),
    "make_folders": ("mkdir", lambda path: storage.make_folders(path / "inner")),
    "make_way": ("mkdir", lambda path: storage.make_way(path / "inner" / "file")),
    "files_below": ("scandir", storage.files_below),
    "allocated": ("scandir", storage.allocated),
    "modified": ("lstat", storage.modified),
    "remove_file": ("unlink", storage.remove_file),
    "is_locked": ("open", storage.is_locked),
    "publish_directory": ("rename", lambda path: storage.publish_directory(path, path / "out")),
    "write_atomically": ("replace", lambda path: storage.write_atomically(path / "file", b"text")),
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
    assert re.match(rf"cannot [a-z ]+( at offset 0 of)? '{re.escape(str(tmp_path))}", str(caught.value))
    assert isinstance(caught.value.__cause__, OSError)


def test_long_and_odd_paths_stay_readable(tmp_path: Path) -> None:
    path = tmp_path / ("long" * 50) / "new\nline\x1b[2J"
    with pytest.raises(smelt.OperationFailed, match=r"new\\nline\\x1b\[2J") as caught:
        storage.open_read(path)
    assert str(caught.value).isprintable()


# --- locks and signals ----------------------------------------------------------------------------------


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert not storage.is_locked(work)
    held = storage.lock_folder(work, b"a long note of the first")
    assert held is not None
    assert storage.is_locked(work)
    assert storage.lock_folder(work, b"rival") is None
    assert (work / storage.LOCK).read_bytes() == b"a long note of the first"
    storage.close(held)  # its owner is killed
    assert not storage.is_locked(work)
    again = storage.lock_folder(work, b"second")
    assert again is not None
    assert (work / storage.LOCK).read_bytes() == b"second"
    (work / "kept").mkdir()
    storage.unlock_folder(work, again)
    assert storage.listdir(work) == ["kept"]
    (work / "kept").rmdir()
    storage.unlock_folder(work, storage.lock_folder(work, b"third") or -1)
    assert storage.listdir(tmp_path) == []


def test_a_lock_whose_name_is_another_file_s_is_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last owner has removed the folder between our opening the lock and our taking it."""
    work, take, taken = tmp_path / "work", storage._try_lock, []

    def late(descriptor: int) -> bool:
        if not taken:
            (work / storage.LOCK).unlink()
            work.rmdir()
        taken.append(descriptor)
        return take(descriptor)

    monkeypatch.setattr(storage, "_try_lock", late)
    held = storage.lock_folder(work, b"note")
    assert held is not None
    assert len(taken) == 2
    assert os.path.samestat(os.fstat(held), os.stat(work / storage.LOCK))
    storage.close(held)


@pytest.mark.parametrize(
    ("code", "granted"), [(errno.ENOLCK, True), (errno.ENOSYS, True), (errno.EOPNOTSUPP, True), (errno.EIO, False)]
)
def test_a_file_system_without_locks_grants_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, granted: bool
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(code))
    if granted:
        storage.close(storage.lock_folder(tmp_path / "work", b"") or -1)
    else:
        with pytest.raises(smelt.OperationFailed, match="cannot lock"):
            storage.lock_folder(tmp_path / "work", b"")


@pytest.mark.parametrize("step", ["ftruncate", "pwrite"])
def test_a_lock_that_cannot_be_labelled_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    monkeypatch.setattr(os, step, failing(errno.ENOSPC))
    with pytest.raises(smelt.OperationFailed, match="No space left"):
        storage.lock_folder(tmp_path / "work", b"note")
    assert storage.listdir(tmp_path) == []


def test_a_lock_that_cannot_be_made_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", failing(errno.ENOSPC))
    with pytest.raises(smelt.OperationFailed, match=r"cannot lock '.*/work': No space left"):
        storage.lock_folder(tmp_path / "work", b"note")
    monkeypatch.undo()
    assert storage.listdir(tmp_path) == []
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / storage.LOCK).symlink_to(tmp_path / "elsewhere")
    for look in (storage.is_locked, lambda folder: storage.lock_folder(folder, b"")):
        with pytest.raises(smelt.OperationFailed, match="symbolic links"):
            look(tmp_path / "work")
    assert storage.listdir(tmp_path) == ["work"]


def test_signals_wait_until_the_block_is_done() -> None:
    came: list[str] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def handler(number: int, frame: object) -> None:
        came.append(signal.Signals(number).name)

    before = [signal.signal(number, handler) for number in numbers]
    try:
        for number in numbers:
            with storage.uninterrupted():
                signal.raise_signal(number)
                signal.raise_signal(signal.SIGTERM)
                came.append("done")
            signal.raise_signal(number)
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)
    assert came == [word for number in numbers for word in ("done", number.name, number.name)]


def test_other_threads_need_not_wait() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: storage.uninterrupted().__enter__()).result() is None


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


def test_two_folders_change_places_or_stay(
    staging: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "out", os.rename
    out.mkdir()
    (out / "weights").write_bytes(b"old")

    def refused(source: Path, destination: Path) -> None:
        if (source, destination) == (staging, out):
            raise OSError(errno.EIO, "no")
        rename(source, destination)

    if way == "rename":
        monkeypatch.setattr(os, "rename", refused)
        with pytest.raises(smelt.OperationFailed, match=r"cannot publish '.*/out': no"):
            storage.publish_directory(staging, out, overwrite=True)
        assert ((out / "weights").read_bytes(), (staging / "weights").read_bytes()) == (b"old", b"new")
        monkeypatch.setattr(os, "rename", rename)
    storage.publish_directory(staging, out, overwrite=True)
    assert ((out / "weights").read_bytes(), (staging / "weights").read_bytes()) == (b"new", b"old")
    assert storage.listdir(tmp_path) == ["out", "out.staging"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("stuck", [False, True])
def test_a_name_that_may_not_last_is_taken_back_or_told(
    staging: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch, overwrite: bool, stuck: bool
) -> None:
    out = tmp_path / "out"
    if overwrite:
        out.mkdir()

    def broken(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), os.stat(tmp_path)):
            if stuck:
                monkeypatch.setattr(os, "rename", failing(errno.EIO))
                monkeypatch.setattr(storage, "_exchange", failing(errno.EIO))
            raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, "fsync", broken)
    expected = r"/out' is in place and whole, but its name may not last: .*no" if stuck else r"cannot sync '.*': no"
    with pytest.raises(smelt.errors.SyncFailed, match=expected):
        storage.publish_directory(staging, out, overwrite=overwrite)
    assert ((out if stuck else staging) / "weights").read_bytes() == b"new"
    assert storage.exists(out) == (stuck or overwrite)


@pytest.mark.parametrize("there", ["nothing", "file", "link"])
def test_a_file_is_published_unless_its_name_is_taken(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    out, synced = tmp_path / "out", []
    (tmp_path / "new").write_bytes(b"new")
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.path.samestat(os.fstat(fd), os.stat(tmp_path))))
    if there == "nothing":
        storage.publish_file(tmp_path / "new", out)
        assert storage.listdir(tmp_path) == ["out"]
        assert (out.read_bytes(), synced) == (b"new", [True])
        return
    out.write_bytes(b"old") if there == "file" else out.symlink_to("nowhere")
    with pytest.raises(smelt.InputRejected, match=r"/out' exists already"):
        storage.publish_file(tmp_path / "new", out)
    assert storage.listdir(tmp_path) == ["new", "out"]
    assert out.is_symlink() or out.read_bytes() == b"old"


def test_other_failures_of_the_system_s_rename_are_told(tmp_path: Path) -> None:
    with pytest.raises(smelt.OperationFailed, match=r"cannot publish '.*/out': No such file"):
        storage.publish_file(tmp_path / "nowhere", tmp_path / "out")


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


def test_a_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, expected in (("", "home/.cache/smelt"), ("XDG_CACHE_HOME", "XDG_CACHE_HOME/smelt"), ("SMELT_CACHE",) * 2):
        for known in ("XDG_CACHE_HOME", "SMELT_CACHE"):
            monkeypatch.delenv(known, raising=False)
        if name:
            monkeypatch.setenv(name, str(tmp_path / name))
        assert storage.cache_folder("part") == tmp_path / expected / "part"
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert storage.cache_folder("part") is None, "somebody else's"
    monkeypatch.undo()
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("SMELT_CACHE", str(tmp_path / "file"))
    assert storage.cache_folder("part") is None
    storage.forget(tmp_path / "file")
    storage.forget(tmp_path / "file")
    assert not storage.exists(tmp_path / "file")


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "scandir", failing(errno.EIO))
    for look in (storage.files_below, storage.allocated):
        with pytest.raises(smelt.OperationFailed, match="Input/output error"):
            look(tmp_path)

"""A run that ended early is continued by the next one of the same plan, and by no other; it gives the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import smelt
from smelt import storage
from smelt.checkpoint.memory import MemoryCheckpoint
from smelt.cli import main
from smelt.engine import journal, leftovers, remove_leftovers
from smelt.engine.operands import CheckpointOperand, Ledger
from smelt.engine.publish import claim, staging
from smelt.engine.tiles import TILE
from smelt.errors import InputRejected, OperationFailed, UsageError
from tests.faults.checker import files_of
from tests.gguf_files import complete
from tests.recipes import Family, recipe
from tests.small_models import save


@pytest.fixture
def tree(family: Family, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(journal, "INTERVAL", 1)
    return recipe("task_arithmetic", family.models[:2], family.base, each={"weight": 0.5})


class Stopping:
    """Progress that ends the run when so many bytes have moved."""

    def __init__(self, after: int) -> None:
        self.left = after

    def start(self, total_bytes: int, label: str) -> None: ...

    def advance(self, nbytes: int) -> None:
        self.left -= nbytes
        if self.left < 0:
            raise OperationFailed("stopped")

    def finish(self) -> None: ...


HALF = 400_000


def stopped(tree: Any, out: Path, **options: Any) -> None:
    with pytest.raises(OperationFailed, match="stopped"):
        smelt.merge(tree, out, progress=Stopping(HALF), threads=1, resume=True, **options)


def continued(artifact: smelt.Artifact) -> bool:
    return any("continued a run" in warning for warning in artifact.warnings)


@pytest.fixture
def whole(tree: Any, tmp_path: Path) -> dict[str, bytes]:
    (tmp_path / "whole").mkdir()
    return files_of(smelt.merge(tree, tmp_path / "whole" / "out", shard_size="100kB").path)


def test_what_is_finished_is_not_made_again(tree: Any, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(tree, out, shard_size="100kB")
    (left,) = leftovers([tmp_path])
    assert (left.path, left.out, left.running) == (tmp_path / "out.smelt-work", out, False)
    assert 0 < left.tensors < 21
    artifact = smelt.merge(tree, out, shard_size="100kB")
    assert any(f"{left.tensors} of 21 tensors were there" in warning for warning in artifact.warnings)
    assert files_of(out) == whole
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


@pytest.mark.parametrize("packing", ["q8_0", "bfloat16"])
def test_a_gguf_file_is_continued_too(packing: str, tree: Any, family: Family, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    base = complete(family.base, tmp_path / "whole" / "base")
    tree = {**tree, "base_model": base, "output": {"format": "gguf", "dtype": packing}}
    whole = files_of(smelt.merge(tree, tmp_path / "whole" / "out").path)
    stopped(tree, tmp_path / "out")
    (left,) = leftovers([tmp_path])
    assert 0 < left.tensors < 21
    assert continued(smelt.merge(tree, tmp_path / "out"))
    assert files_of(tmp_path / "out") == whole


def test_only_the_same_plan_continues(tree: Any, family: Family, tmp_path: Path) -> None:
    """Another recipe, other options, another file in the place of an input: begun anew, and nothing is thrown away."""
    model = save(tmp_path / "model", family.model_arrays[0])
    same = recipe("linear", [model, family.models[1]])
    stopped(same, tmp_path / "out")
    (before,) = leftovers([tmp_path])
    others: list[tuple[Any, dict[str, Any]]] = [
        (recipe("linear", [family.models[1], model]), {}), (same, {"seed": 5}), (same, {"shard_size": "50kB"}),
        (same, {"resume": False}),
    ]  # fmt: skip
    for other, options in others:
        assert not continued(smelt.merge(other, tmp_path / "out", **options))
        shutil.rmtree(tmp_path / "out")
        assert leftovers([tmp_path])[0].tensors == before.tensors
    os.utime(Path(model) / "model.safetensors")
    assert not continued(smelt.merge(same, tmp_path / "out"))


def test_what_takes_long_is_recorded_before_it_is_much(
    tree: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few bytes in many minutes: they are there after a kill. A disk that is slow is not asked all the time."""
    monkeypatch.setattr(journal, "INTERVAL", 1 << 40)
    stopped(tree, tmp_path / "quick")
    monkeypatch.setattr(journal, "PATIENCE", 0.0)
    monkeypatch.setattr(journal, "_SHARE", 1e9)
    stopped(tree, tmp_path / "slow")
    monkeypatch.setattr(journal, "_SHARE", 1e-9)
    stopped(tree, tmp_path / "waiting")
    quick, slow, waiting = (left.tensors for left in leftovers([tmp_path]))
    assert (quick, waiting) == (0, 1)
    assert slow > 5


def test_a_failed_run_leaves_nothing_unless_that_was_asked_for(tree: Any, tmp_path: Path) -> None:
    with pytest.raises(OperationFailed, match="stopped"):
        smelt.merge(tree, tmp_path / "out", progress=Stopping(HALF))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["data", "journal", "torn journal", "no weights", "short weights", "stranger"])
def test_what_was_left_is_not_believed(damage: str, tree: Any, whole: dict[str, bytes], tmp_path: Path) -> None:
    stopped(tree, tmp_path / "out", shard_size="100kB")
    (attempt,) = (path for path in (tmp_path / "out.smelt-work").iterdir() if path.is_dir())
    weights, lines = sorted((attempt / "new").glob("*.safetensors")), attempt / "journal"
    if damage == "data":
        for path in weights:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
    elif damage == "journal":
        lines.write_bytes(lines.read_bytes().replace(b"sha256", b"sha257"))
    elif damage == "torn journal":
        os.truncate(lines, lines.stat().st_size - 20)
    elif damage == "stranger":
        (attempt / "new" / "pytorch_model.bin").write_bytes(b"x")
    for path in weights if "weights" in damage else ():
        path.unlink() if damage == "no weights" else os.truncate(path, 100)
    smelt.merge(tree, tmp_path / "out", shard_size="100kB")
    assert files_of(tmp_path / "out") == whole


def test_after_a_failed_sync_nothing_is_kept(tree: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(4, -1, -1))

    def failing(descriptor: int) -> None:
        if next(calls, -1) == 0:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OperationFailed, match=r"cannot sync '.*smelt-work"):
        smelt.merge(tree, tmp_path / "out", resume=True)
    assert not list(tmp_path.iterdir())


def test_warnings_are_those_of_a_whole_run(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "INTERVAL", 1)
    arrays = {name: array.copy() for name, array in family.model_arrays[0].items()}
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        arrays[name].reshape(-1)[3] = float("nan")
    tree = recipe("linear", [save(tmp_path / "odd", arrays), family.models[1]])
    smelt.merge(tree, tmp_path / "whole", on_nonfinite="warn", threads=2, card=False)
    stopped(tree, tmp_path / "out", on_nonfinite="warn", card=False)
    smelt.merge(tree, tmp_path / "out", on_nonfinite="warn", card=False)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "out")


def test_stages_are_continued_too(tree: Any, family: Family, tmp_path: Path) -> None:
    soup = recipe("linear", family.models[:2], dtype="float32")
    outer = {"merge_method": "slerp", "base_model": soup, "models": [{"model": family.models[2]}]}
    outer["parameters"] = {"t": 0.5}
    smelt.merge(outer, tmp_path / "whole")
    with pytest.raises(OperationFailed, match="stopped"):
        smelt.merge(outer, tmp_path / "out", progress=Stopping(1_300_000), threads=1, resume=True)
    artifact = smelt.merge(outer, tmp_path / "out")
    assert any("an earlier run left it" in warning for warning in artifact.warnings)
    assert continued(artifact)
    assert files_of(tmp_path / "out")["model.safetensors"] == files_of(tmp_path / "whole")["model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


def test_no_descriptor_stays_open(tree: Any, tmp_path: Path) -> None:
    smelt.merge(tree, tmp_path / "warm")  # compiles, and starts what stays
    before = len(os.listdir("/proc/self/fd"))
    stopped(tree, tmp_path / "out")
    leftovers([tmp_path])
    smelt.merge(tree, tmp_path / "out")
    smelt.merge(tree, tmp_path / "out", overwrite=True)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_was_read_is_known_when_it_was_read_whole() -> None:
    ledger = Ledger()
    arrays = {"read": np.zeros(3, np.float32), "left alone": np.zeros(3, np.float32), "long": np.zeros(TILE + 1, "f4")}
    read, untouched, long = (CheckpointOperand(MemoryCheckpoint(arrays, "a"), name, ledger) for name in arrays)
    output: Any = SimpleNamespace(
        piece=SimpleNamespace(
            sources=[SimpleNamespace(operand=lambda _, each=each: each) for each in (untouched, read)]
        ),
        statistics=(),
    )
    read.read(0, np.empty(3, np.float32))
    assert journal.reads_of(ledger, output) == [("a", "read", ledger.digest("a", "read", 3))]
    output.statistics = (long,)
    assert journal.reads_of(ledger, output) is not None
    long.read(0, np.empty(TILE, np.float32))
    assert journal.reads_of(ledger, output) is None, "the last element is missing"


def test_a_line_is_written_when_its_data_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "INTERVAL", 10)
    events: list[str] = []
    with journal.Journal(tmp_path / "journal", lambda name: None if name == "unknown" else [("a", name, "d")]) as lines:
        for name, nbytes, due in (("x", 4, False), ("unknown", 10, False), ("y", 5, False), ("z", 1, True)):
            lines.add(name, "0" * 64, nbytes)
            assert lines.is_due == due
        lines.commit(lambda: events.append(f"synced, {(tmp_path / 'journal').stat().st_size}"))
        lines.add("more", "1" * 64, 9)
        assert not lines.is_due
        lines.paused = True
        lines.add("late", "2" * 64, 10)
        assert not lines.is_due
        lines.commit(lambda: events.append("synced"))
    assert events == ["synced, 0", "synced"]
    content = (tmp_path / "journal").read_bytes()
    (tmp_path / "journal").write_bytes(content[:-1] + b"x")  # the last line is torn
    with journal.Journal(tmp_path / "journal", lambda name: []) as lines:
        assert lines.finished == {"x": "0" * 64, "y": "0" * 64, "z": "0" * 64}
        assert lines.reads == {name: [["a", name, "d"]] for name in "xyz"}
        lines.add("more", "1" * 64, 1)
        lines.commit(lambda: None)
    found, length = journal.recorded(tmp_path / "journal")
    assert [entry["tensor"] for entry in found] == ["x", "y", "z", "more"]
    assert length == (tmp_path / "journal").stat().st_size
    (tmp_path / "folder").mkdir()
    assert journal.recorded(tmp_path / "folder") == journal.recorded(tmp_path / "nowhere") == ([], 0)


# --- one process at a time ------------------------------------------------------------------------------


def test_a_destination_belongs_to_one_run(tree: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(tree))
    with claim(tmp_path / "out"):
        code = main(["merge", str(path), str(tmp_path / "out")])
        assert [each.running for each in leftovers([tmp_path])] == [True]
        with pytest.raises(OperationFailed, match="is being written by another process"):
            remove_leftovers([tmp_path / "out"])
    assert code == 3
    assert f"is being written by another process (number {os.getpid()} on " in capsys.readouterr().err
    assert main(["merge", str(path), str(tmp_path / "out")]) == 0


def test_a_work_folder_of_somebody_else_is_refused(tree: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.smelt-work").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(OperationFailed, match="it belongs to another user"):
        smelt.merge(tree, tmp_path / "out")


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b"{}", b'{"pid": 1}', b"x" * 5000])
def test_an_owner_that_left_no_name_is_told_without_it(note: bytes, tmp_path: Path) -> None:
    with claim(tmp_path / "out") as work:
        (work / storage.LOCK).write_bytes(note)
        with pytest.raises(InputRejected, match="by another process: wait"), claim(tmp_path / "out"):
            pass
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_removed_in_the_end_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OperationFailed("no")

    told: list[str] = []
    with staging(tmp_path / "out", warn=told.append) as folder:
        (folder / "file").write_bytes(b"new")
        monkeypatch.setattr(storage, "remove_tree", refuse)
    assert told == ["no; smelt clean names what was left"]
    assert files_of(tmp_path / "out") == {"file": b"new"}
    assert [left.path.name for left in leftovers([tmp_path])] == ["out.smelt-work"]
    with pytest.raises(KeyError), staging(tmp_path / "other"):
        raise KeyError  # and not what removing says


def test_attempts_of_one_name_go_on_where_they_were(tmp_path: Path) -> None:
    """What is left: of a failed run where it is to be kept, and of none whose sync failed."""

    def attempt(error: Exception, keep: bool) -> dict[str, bytes]:
        with claim(tmp_path / "out") as work:
            with (
                contextlib.suppress(type(error)),
                staging(tmp_path / "out", work=work, name="attempt", keep=keep) as folder,
            ):
                found = files_of(folder)
                (folder / "file").write_bytes(b"kept")
                raise error
            assert (work / "attempt").exists() == (keep and not isinstance(error, storage.SyncFailed))
        return found

    assert attempt(KeyError(), True) == {}
    assert attempt(KeyError(), False) == {"file": b"kept"}
    assert not list(tmp_path.iterdir())
    attempt(storage.SyncFailed("no"), True)
    assert not list(tmp_path.iterdir())


def test_links_in_a_work_folder_are_not_followed(tree: Any, tmp_path: Path) -> None:
    stopped(tree, tmp_path / "out")
    (weights,) = tmp_path.rglob("model.safetensors")
    (tmp_path / "precious").write_text("mine")
    weights.unlink()
    weights.symlink_to(tmp_path / "precious")
    with pytest.raises(OperationFailed, match=r"cannot open .*model.safetensors"):
        smelt.merge(tree, tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "mine"


# --- smelt clean ----------------------------------------------------------------------------------------


def test_what_is_left_is_described(tmp_path: Path) -> None:
    work = tmp_path / "out.smelt-work"
    for attempt, names in (("one", "ab"), ("two", "abc")):
        (work / attempt / "new").mkdir(parents=True)
        (work / attempt / "new" / "weights").write_bytes(bytes(10_000))
        with journal.Journal(work / attempt / "journal", lambda name: []) as lines:
            for name in names:
                lines.add(name, "0" * 64, 1)
            lines.commit(lambda: None)
    (work / storage.LOCK).write_bytes(b"")
    for age, path in enumerate((work / "one" / "journal", work / "one", work / "two" / "journal", work / "two", work)):
        os.utime(path, (1000 - age, 1000 - age))
    for place in (tmp_path, tmp_path / "out", work, tmp_path / "out.smelt-work" / "..", str(tmp_path / "out")):
        (left,) = leftovers([place])
        assert (left.path.name, left.out.name) == ("out.smelt-work", "out")
        assert (left.tensors, left.modified, left.running) == (3, 1000, False)
        assert left.nbytes == storage.allocated(work)
    assert left.as_dict() == {
        "path": str(work), "out": str(tmp_path / "out"), "bytes": left.nbytes, "modified": 1000, "tensors": 3,
        "running": False,
    }  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "inner.smelt-work").mkdir()
    inner, outer = leftovers([tmp_path / "out"])
    assert (inner.out, inner.tensors) == (tmp_path / "out" / "inner", 0)
    assert outer == left, "what lies in the folder, and what was to become it"


def test_clean_lists_and_removes_what_is_named(tree: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        stopped(tree, tmp_path / name)
    assert main(["clean", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("left behind") == 2
    assert main(["clean", str(tmp_path / "a"), "--remove", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["out"] == str(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["b.smelt-work"]
    assert main(["clean", str(tmp_path), "--remove"]) == 0
    assert not os.listdir(tmp_path)
    capsys.readouterr()
    assert main(["clean", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "nothing is left behind\n"
    assert main(["clean", "--remove"]) == 2
    with pytest.raises(UsageError, match="no such folder"):
        leftovers([tmp_path / "nowhere"])


# --- --overwrite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_overwriting_replaces_what_smelt_made(
    way: str, tree: Any, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "two renames":
        monkeypatch.setattr(storage, "_libc_function", lambda *arguments: None)
    out = tmp_path / "out"
    smelt.merge(recipe("linear", family.models), out, shard_size="50kB")
    with pytest.raises(UsageError, match="exists and is not empty"):
        smelt.merge(tree, out)
    smelt.merge(tree, out, overwrite=True)
    smelt.merge(tree, tmp_path / "other")
    assert {**files_of(out), "README.md": b""} == {**files_of(tmp_path / "other"), "README.md": b""} | {
        "smelt-manifest.json": files_of(out)["smelt-manifest.json"]
    }
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]
    smelt.merge(tree, tmp_path / "third", overwrite=True)
    assert smelt.verify(tmp_path / "third").ok


def test_overwriting_takes_nothing_else(tree: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="only what smelt made is overwritten"):
        smelt.merge(tree, tmp_path / "out", overwrite=True)
    assert files_of(tmp_path) == {"out/thesis.tex": b"mine"}


def test_a_failed_overwriting_leaves_the_old(tree: Any, family: Family, tmp_path: Path) -> None:
    smelt.merge(recipe("linear", family.models), tmp_path / "out")
    before = files_of(tmp_path)
    with pytest.raises(OperationFailed, match="stopped"):
        smelt.merge(tree, tmp_path / "out", overwrite=True, progress=Stopping(HALF))
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_name_that_cannot_be_synced_is_taken_back(
    overwrite: bool, tree: Any, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if overwrite:
        smelt.merge(recipe("linear", family.models), tmp_path / "out")
    before, sync = files_of(tmp_path), storage.fsync_directory

    def failing(path: Path) -> None:
        if path == tmp_path:
            raise storage.SyncFailed("no")
        sync(path)

    monkeypatch.setattr(storage, "fsync_directory", failing)
    with pytest.raises(OperationFailed, match="no"):
        smelt.merge(tree, tmp_path / "out", overwrite=overwrite)
    assert files_of(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == (["out"] if overwrite else [])

"""The output is there, whole, or it is not: where it may go, what it holds, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import smelt
from smelt import storage
from smelt.cli import main
from smelt.errors import OperationFailed, SmeltError, UsageError
from tests.readback import nothing_left, stored
from tests.recipes import Family, recipe
from tests.small_models import CONFIG, save


@pytest.fixture
def tree(family: Family) -> dict[str, Any]:
    return recipe("task_arithmetic", family.models[:2], family.base, each={"weight": 0.5})


def everything(folder: Path) -> dict[str, bytes]:
    """The bytes of all files below ``folder``."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Quiet:
    """Progress that nobody looks at."""

    def start(self, total_bytes: int, label: str) -> None: ...

    def advance(self, nbytes: int) -> None: ...

    def finish(self) -> None: ...


# --- where it may go ------------------------------------------------------------------------------------


def test_an_empty_folder_is_taken(tree: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    smelt.merge(tree, out)
    assert stored(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_relative_path_is_seen_from_here(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    artifact = smelt.merge(tree, "out")
    assert artifact.path == Path("out")
    assert stored(tmp_path / "out")


def occupied(out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")


def a_file(out: Path) -> None:
    out.write_text("mine")


def a_link_to_nowhere(out: Path) -> None:
    out.symlink_to(out.parent / "nowhere")


def a_link_to_a_folder(out: Path) -> None:
    (out.parent / "elsewhere").mkdir()
    out.symlink_to(out.parent / "elsewhere")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (occupied, "exists and is not empty"),
        (a_file, "exists and is not a folder"),
        (a_link_to_nowhere, "exists and is not a folder"),
        (a_link_to_a_folder, "exists and is not a folder"),
    ],
)
def test_what_is_there_is_left_alone(
    prepare: Callable[[Path], None], message: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    prepare(tmp_path / "out")
    before = {path: os.lstat(path).st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UsageError, match=message):
        smelt.merge(tree, tmp_path / "out")
    assert {path: os.lstat(path).st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_parent_must_exist(tree: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'.*missing' does not exist: make it first"):
        smelt.merge(tree, tmp_path / "missing" / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("inside", ["model/out", "model/a/out", "model", "."])
def test_outputs_and_inputs_do_not_lie_inside_each_other(inside: str, family: Family, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "model" / "a").mkdir(parents=True)
    (home / "model" / "a").rmdir()
    (home / "model").rmdir()
    model = save(home / "model", family.model_arrays[0])
    (home / "model" / "a").mkdir()
    before = everything(tmp_path)
    with pytest.raises(UsageError, match=r"lie inside each other|is not empty"):
        smelt.merge(recipe("linear", [model, family.models[1]]), home / inside)
    assert everything(tmp_path) == before


def test_a_link_does_not_hide_that_the_output_lies_in_an_input(family: Family, tmp_path: Path) -> None:
    model = save(tmp_path / "model", family.model_arrays[0])
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for named, out in ((model, tmp_path / "link" / "out"), (str(tmp_path / "link"), tmp_path / "model" / "out")):
        with pytest.raises(UsageError, match="lie inside each other"):
            smelt.merge(recipe("linear", [named, family.models[1]]), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model"]


def test_a_destination_that_appears_meanwhile_is_not_touched(tree: dict[str, Any], tmp_path: Path) -> None:
    """Two runs to one place: one of them wins, the other is refused."""
    out = tmp_path / "out"

    class Rival(Quiet):
        def finish(self) -> None:
            out.mkdir(exist_ok=True)
            (out / "theirs").write_text("x")

    with pytest.raises(SmeltError, match="exists and is not an empty folder"):
        smelt.merge(tree, out, progress=Rival())
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- what it holds --------------------------------------------------------------------------------------


def test_the_folder_is_complete(tree: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    smelt.merge(tree, out)
    names = {"README.md", "config.json", "model.safetensors", "smelt-manifest.json", "tokenizer.json"}
    assert {path.name for path in out.iterdir()} == names
    assert json.loads((out / "config.json").read_text()) == CONFIG
    smelt.merge(tree, tmp_path / "bare", card=False)
    assert {path.name for path in (tmp_path / "bare").iterdir()} == names - {"README.md"}


def test_the_card_names_method_models_and_recipe(tree: dict[str, Any], tmp_path: Path) -> None:
    smelt.merge(tree, tmp_path / "blend")
    card = (tmp_path / "blend" / "README.md").read_text()
    assert card.startswith("---\n")
    for text in ("# blend", "task_arithmetic", "https://arxiv.org/abs/2212.04089", "`expert0`", "`expert1`", "`base`"):
        assert text in card


def test_no_file_tells_where_its_author_works(family: Family, tmp_path: Path) -> None:
    """Neither the recipe nor the notices, which speak of models and of the recipe's file."""
    twin = save(tmp_path / "twin", {**family.model_arrays[0], "extra.weight": family.base_arrays["lm_head.weight"]})
    weights = [{"filter": "nowhere", "value": 1}, {"value": 1}]
    tree = recipe("task_arithmetic", [family.models[0], twin], family.base, each={"weight": weights})
    recipe_file = tmp_path / "recipe.yml"
    recipe_file.write_text(json.dumps(tree))
    artifact = smelt.merge(recipe_file, tmp_path / "out", on_extra="copy")
    assert len(artifact.warnings) >= 3, "an extra tensor, a filter without a match, a duplicate"
    for path in artifact.path.iterdir():
        content = path.read_bytes()
        for place in (family.folder, tmp_path, Path.cwd()):
            assert str(place).encode() not in content, path.name


def test_the_manifest_says_what_it_was_made_of(tree: dict[str, Any], family: Family, tmp_path: Path) -> None:
    smelt.merge(tree, tmp_path / "out", seed=3)
    manifest = json.loads((tmp_path / "out" / "smelt-manifest.json").read_text())
    written = stored(tmp_path / "out")
    assert manifest["method"] == "task_arithmetic"
    assert manifest["seed"] == 3
    assert sorted(item["model"] for item in manifest["inputs"]) == ["base", "expert0", "expert1"]
    assert all(item["tensors_read"] == len(family.base_arrays) for item in manifest["inputs"])
    assert {n: (t["dtype"], tuple(t["shape"])) for n, t in manifest["tensors"].items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in written.items()
    }
    assert set(manifest["files"]) == {"README.md", "config.json", "tokenizer.json"}


def test_two_runs_write_the_same_folder(tree: dict[str, Any], tmp_path: Path) -> None:
    outs = [tmp_path / name / "out" for name in ("a", "b")]
    for out, threads in zip(outs, (1, 3), strict=True):
        out.parent.mkdir()
        smelt.merge(tree, out, threads=threads)
    assert everything(outs[0]) == everything(outs[1])


def test_inputs_that_differ_have_different_digests(family: Family, tmp_path: Path) -> None:
    digests = []
    for index, models in enumerate([family.models[:2], family.models[1:]]):
        smelt.merge(recipe("linear", models), tmp_path / str(index))
        manifest = json.loads((tmp_path / str(index) / "smelt-manifest.json").read_text())
        digests.append({item["model"]: item["digest"] for item in manifest["inputs"]})
    assert digests[0]["expert1"] == digests[1]["expert1"]
    assert len({*digests[0].values(), *digests[1].values()}) == 3


@pytest.mark.parametrize("mask", [0o077, 0o002, 0o000])
def test_modes_follow_the_umask(mask: int, tree: dict[str, Any], tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        smelt.merge(tree, tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o666 & ~mask}


_AUDITED: list[tuple[str, tuple[Any, ...]]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _AUDITED is not None and (event == "open" or event.partition(".")[0] in ("socket", "subprocess", "os")):
        _AUDITED.append((event, arguments))


sys.addaudithook(_audit)  # it stays for good, but listens only when asked to


def test_nothing_else_is_touched(tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No socket, no process, and no file is opened for writing outside of the staging folder."""
    smelt.merge(tree, tmp_path / "warm")  # compiles, which writes to the cache
    monkeypatch.setattr(sys.modules[__name__], "_AUDITED", [])
    smelt.merge(tree, tmp_path / "out")
    events = list(_AUDITED or ())
    monkeypatch.undo()
    written = [a[0] for event, a in events if event == "open" and a[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)]
    assert written
    assert all(str(path).startswith(str(tmp_path / "out.smelt-")) for path in written)
    assert {event for event, _ in events} <= {
        "open",
        "os.mkdir",
        "os.rmdir",
        "os.listdir",
        "os.walk",
        "os.scandir",
        "os.remove",
        "os.rename",
        "os.truncate",
    }


# --- what is left behind --------------------------------------------------------------------------------


class Interrupting(Quiet):
    """Raises once work is under way."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def advance(self, nbytes: int) -> None:
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), MemoryError()])
def test_an_interrupted_merge_leaves_nothing(error: BaseException, tree: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        smelt.merge(tree, tmp_path / "out", progress=Interrupting(error))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_and_leaves_nothing(
    number: int, code: int, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent while threads are at work and the main one waits for them."""

    first = threading.Lock()

    class Signalling(Quiet):
        def advance(self, nbytes: int) -> None:
            if first.acquire(blocking=False):  # a second signal would end the process at once
                os.kill(os.getpid(), number)

    monkeypatch.setattr("smelt.cli.merge.bar", lambda quiet: Signalling())
    (tmp_path / "recipe.yml").write_text(json.dumps(tree))
    assert main(["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "out")]) == code
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yml"]


def test_an_interrupt_of_the_main_thread_leaves_nothing(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("smelt.engine.run.manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smelt.merge(tree, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_empty_destination_survives_a_failure(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        smelt.merge(tree, tmp_path / "out", progress=Interrupting(KeyboardInterrupt()))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_too_little_disk_is_told_before_any_work(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1000)
    watcher = Interrupting(AssertionError("work began"))
    with pytest.raises(OperationFailed, match=r"not enough disk for '.*out': \d+ bytes needed, 1000 free"):
        smelt.merge(tree, tmp_path / "out", progress=watcher)
    assert nothing_left(tmp_path / "out")


OPERATIONS = ["create", "pwrite_all", "fsync", "fsync_directory", "ensure_folder", "write_small", "publish_directory"]


@pytest.fixture(params=OPERATIONS)
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the n-th call of one operation of the file system fail."""
    operation: str = request.param
    real = getattr(storage, operation)

    def arm(nth: int) -> None:
        calls = iter(range(nth, -1, -1))

        def fail(*arguments: Any, **options: Any) -> Any:
            if next(calls, 1) == 0:
                raise OperationFailed(f"injected: {operation}")
            return real(*arguments, **options)

        monkeypatch.setattr(storage, operation, fail)

    return arm


@pytest.mark.parametrize("nth", [0, 1, 3])
def test_whatever_fails_nothing_is_left(
    failing: Callable[[int], None], nth: int, tree: dict[str, Any], tmp_path: Path
) -> None:
    """Either the operation is not called that often and all is well, or nothing is there."""
    failing(nth)
    out, failure = tmp_path / "out", ""
    try:
        smelt.merge(tree, out, shard_size="100kB")
    except OperationFailed as error:
        failure = str(error)
    assert failure or nth > 0
    if not failure:
        assert smelt.verify(out).ok
    else:
        assert nothing_left(out)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["out"])

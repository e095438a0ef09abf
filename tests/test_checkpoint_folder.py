"""Checkpoints on disk: which files are meant, what is read with them, and that they act as lazy mappings."""

from __future__ import annotations

import json
import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import smelt
from smelt.checkpoint import FileIdentity, TensorInfo, folder, selection
from smelt.checkpoint.place import LocalPlace, split
from smelt.checkpoint.side import SideFiles

from .attacks import FILE, INDEX, ONE, TWO, entry, good, holding, indexed, packed, put
from .test_safetensors_reader import values

BOTH = {"a": ONE, "b": TWO}
SHARDS = {ONE: good("a"), TWO: good("b")}


def numbered(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


# --- which files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [
        {FILE: good("a", "b")},
        {"diffusion_pytorch_model.safetensors": good("a", "b")},
        {"open_clip_model.safetensors": good("a", "b"), "open_clip_config.json": b"{}"},
        {"anything.safetensors": good("a", "b")},
        SHARDS,
        {f"weights-{number}-of-2.safetensors": good(name) for number, name in ((1, "a"), (2, "b"))},
        {FILE: good("a", "b"), "pytorch_model.bin": b"", "consolidated.safetensors": good("x")},
        {FILE: good("a", "b"), "adapter_model.safetensors": good("x"), "adapter_config.json": b"{}"},
        {FILE: good("a", "b"), "model.fp16.safetensors": good("x")},
    ],
)
def test_the_weights_are_found(tmp_path: Path, files: dict[str, bytes]) -> None:
    with smelt.load(holding(files)(tmp_path)) as checkpoint:
        assert list(checkpoint) == ["a", "b"]


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "odd"])
def test_an_index_decides(tmp_path: Path, stem: str) -> None:
    """Shards that it does not name, stale or not, are left alone."""
    holding({**SHARDS, numbered(3, 3): good("x"), "consolidated.safetensors": good("y")})(tmp_path)
    put(tmp_path, json.dumps({"weight_map": BOTH}).encode(), f"{stem}.safetensors.index.json")
    with smelt.load(tmp_path) as checkpoint:
        assert {name: info.file for name, info in checkpoint.tensors.items()} == BOTH
        assert [file.path.name for file in checkpoint.files()] == [ONE, TWO]


def test_an_index_of_the_single_file_is_no_rival(tmp_path: Path) -> None:
    with smelt.load(indexed({"a": FILE}, {FILE: good("a")})(tmp_path)) as checkpoint:
        assert list(checkpoint) == ["a"]


@pytest.mark.parametrize(("chosen", "names"), [(FILE, ["x"]), (INDEX, ["a", "b"])])
def test_of_two_rivals_a_path_chooses(tmp_path: Path, chosen: str, names: list[str]) -> None:
    indexed(BOTH, {**SHARDS, FILE: good("x"), "config.json": b'{"a": 1}'})(tmp_path)
    with smelt.load(tmp_path / chosen) as checkpoint:
        assert list(checkpoint) == names
        assert checkpoint.config == {"a": 1}
        assert checkpoint.folder == tmp_path


def test_one_shard_of_many_is_said(tmp_path: Path) -> None:
    with smelt.load(holding(SHARDS)(tmp_path) / ONE) as checkpoint:
        assert list(checkpoint) == ["a"]
        assert checkpoint.notices == [f"'{ONE}' is one of 2 shards: the tensors of the others are not read"]
    with smelt.load(put(tmp_path, good("a"), numbered(1, 1))) as checkpoint:
        assert checkpoint.notices == []


def test_more_shards_than_the_soft_limit_of_open_files(tmp_path: Path) -> None:
    for number in range(1, 61):
        put(tmp_path, good(f"t{number:02d}"), numbered(number, 60))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        with smelt.load(tmp_path) as checkpoint:
            assert len(checkpoint) == 60
            assert all(array.tolist() == [0, 0] for array in checkpoint.values())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_all_disagreements_with_the_index_are_told_at_once(tmp_path: Path) -> None:
    indexed({"a": ONE, "missing": TWO}, {ONE: good("a", "unlisted"), TWO: good("b")})(tmp_path)
    with pytest.raises(smelt.InputRejected) as caught:
        smelt.load(tmp_path)
    assert [problem.split("tensor ")[1].split()[0] for problem in caught.value.problems] == [
        "'b'",
        "'missing'",
        "'unlisted'",
    ]


def test_a_flood_of_problems_is_cut(tmp_path: Path) -> None:
    listed = {f"tensor{number}": FILE for number in range(1000)}
    with pytest.raises(smelt.InputRejected, match=r"and 981 more problems of this kind") as caught:
        smelt.load(indexed(listed, {FILE: good("a")})(tmp_path))
    assert len(caught.value.problems) == 21


@pytest.mark.parametrize(("missing", "lines"), [(20, 20), (21, 21), (22, 21)])
def test_what_is_cut_is_counted(tmp_path: Path, missing: int, lines: int) -> None:
    listed = {"a": FILE} | {f"tensor{number}": FILE for number in range(missing)}
    with pytest.raises(smelt.InputRejected) as caught:
        smelt.load(indexed(listed, {FILE: good("a")})(tmp_path))
    assert len(caught.value.problems) == lines
    assert str(caught.value).endswith(f"and {missing - 20} more problems of this kind") == (missing > 20)


def test_the_tensors_of_all_files_together_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holding({ONE: good("a", "b"), TWO: good("c")})(tmp_path)
    monkeypatch.setattr(folder, "MAX_TENSORS", 3)
    assert len(smelt.load(tmp_path)) == 3
    monkeypatch.setattr(folder, "MAX_TENSORS", 2)
    with pytest.raises(smelt.InputRejected, match="holds more than 2 tensors"):
        smelt.load(tmp_path)


def test_the_number_of_shards_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "MAX_SHARDS", 2)
    assert len(smelt.load(holding(SHARDS)(tmp_path))) == 2
    assert len(smelt.load(indexed(BOTH, SHARDS)(tmp_path))) == 2
    put(tmp_path, json.dumps({"weight_map": {**BOTH, "c": FILE}}).encode(), INDEX)
    with pytest.raises(smelt.InputRejected, match="names 3 files, at most 2 are accepted"):
        smelt.load(tmp_path)
    (tmp_path / "three").mkdir()
    for total in (3, 0):
        put(tmp_path / "three", good("a"), numbered(1, total))
        with pytest.raises(smelt.InputRejected, match=r"0000\d.safetensors' counts shards beyond 2"):
            smelt.load(tmp_path / "three")
        (tmp_path / "three" / numbered(1, total)).unlink()


@pytest.mark.parametrize(("length", "accepted"), [(255, True), (256, False)])
def test_the_names_of_shards_are_bounded(tmp_path: Path, length: int, accepted: bool) -> None:
    name = "n" * (length - len(".safetensors")) + ".safetensors"
    indexed({"a": name}, {})(tmp_path)
    if accepted:
        put(tmp_path, good("a"), name)
        assert list(smelt.load(tmp_path)) == ["a"]
    else:
        with pytest.raises(smelt.InputRejected, match="expected the plain name of a file in the same folder"):
            smelt.load(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    for total, told in (
        (5, r"4 of its .* missing \(([^,]*, ){3}[^,]*-00005-of-00005.safetensors'\): download"),
        (6, r"5 of its .* missing \(([^,]*, ){3}[^,]*-00005-of-00006.safetensors' and 1 more\): "),
    ):
        put(tmp_path, good("a"), numbered(1, total))
        with pytest.raises(smelt.InputRejected, match=told):
            smelt.load(tmp_path)
        (tmp_path / numbered(1, total)).unlink()
    put(tmp_path, good("a"), numbered(1, 2))
    put(tmp_path, b"", numbered(2, 2) + ".incomplete")
    with pytest.raises(smelt.InputRejected, match="a download is unfinished: download the model again"):
        smelt.load(tmp_path)


def test_side_files_are_those_beside_the_weights(tmp_path: Path) -> None:
    holding({FILE: good("a"), "config.json": b"{}", "notes": b"text"})(tmp_path)
    with smelt.load(tmp_path) as checkpoint:
        side = checkpoint.side_files
        assert list(side) == ["config.json", FILE, "notes"]
        assert (len(side), side["notes"], "notes" in side, "else" in side) == (3, b"text", True, False)
        with pytest.raises(KeyError):
            side["else"]
        (tmp_path / "notes").unlink()
        with pytest.raises(KeyError):
            side["notes"]
        checkpoint.strip()
        assert (dict(checkpoint.side_files), checkpoint.config, checkpoint.folder) == ({}, {}, None)
    (tmp_path / "inner").mkdir()
    put(tmp_path / "inner", b"below", "notes")
    assert SideFiles(LocalPlace(tmp_path), ["inner/notes"])["inner/notes"] == b"below"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://owner/base+hf://owner/adapter", ("hf://owner/base", "hf://owner/adapter")),
        ("hf://owner/base+adapter", ("hf://owner/base", "adapter")),
        ("hf://owner/b+c+adapter", ("hf://owner/b+c+adapter", "")),
        ("base+s3://bucket/adapter", ("base", "s3://bucket/adapter")),
        ("s3://bucket/a+b", ("s3://bucket/a+b", "")),
        ("base+adapter", ("base+adapter", "")),
        ("+s3://bucket/adapter", ("+s3://bucket/adapter", "")),
        ("hf://owner/base+", ("hf://owner/base+", "")),
        ("hf://owner/base", ("hf://owner/base", "")),
    ],
)
def test_a_base_and_its_adapter_are_told_from_a_plus_in_a_url(text: str, parts: tuple[str, str]) -> None:
    assert split(text) == parts


@given(
    st.one_of(values, st.builds(lambda value: {"weight_map": value}, values)), st.sampled_from([INDEX, "config.json"])
)
def test_any_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, value: object, name: str) -> None:
    home = tmp_path_factory.mktemp("json")
    holding({FILE: good("a"), name: json.dumps(value).encode()})(home)
    if name == "config.json" and isinstance(value, dict):
        assert smelt.load(home).config.keys() == value.keys()
        return
    with pytest.raises(smelt.InputRejected, match=re.escape(name)) as caught:
        smelt.load(home)
    assert str(caught.value).isprintable()


# --- what is read with them -----------------------------------------------------------------------------


def test_config_metadata_and_label(tmp_path: Path) -> None:
    first = packed({"__metadata__": {"format": "pt", "x": "1"}, "a": entry()}, bytes(8))
    second = packed({"__metadata__": {"y": "2"}, "b": entry()}, bytes(8))
    config = b'{"model_type": "mamba2", "time_step_limit": [0.0, Infinity]}'
    holding({ONE: first, TWO: second, "config.json": config})(tmp_path)
    with smelt.load(tmp_path) as checkpoint:
        assert checkpoint.config == {"model_type": "mamba2", "time_step_limit": [0.0, float("inf")]}
        assert checkpoint.metadata == {"format": "pt", "x": "1", "y": "2"}
        assert (checkpoint.label, checkpoint.folder, checkpoint.revision) == (str(tmp_path), tmp_path, None)
    with smelt.load(tmp_path, label="mine") as checkpoint:
        assert checkpoint.label == "mine"


def test_a_folder_without_config_has_an_empty_one(tmp_path: Path) -> None:
    with smelt.load(holding({FILE: good("a")})(tmp_path)) as checkpoint:
        assert checkpoint.config == {}
        assert checkpoint.folder == tmp_path


def test_a_file_among_others_has_no_side_files(tmp_path: Path) -> None:
    holding({"one.safetensors": good("a"), "two.safetensors": good("b")})(tmp_path)
    with smelt.load(tmp_path / "one.safetensors") as checkpoint:
        assert checkpoint.folder is None


def test_unknown_fields_become_notices(tmp_path: Path) -> None:
    put(tmp_path, packed({"w": {**entry(), "colour": "red"}}, bytes(8)))
    with smelt.load(tmp_path) as checkpoint:
        assert checkpoint.notices == [f"'{FILE}': tensor 'w': the unknown field 'colour' is ignored"]


def test_files_are_identified(tmp_path: Path) -> None:
    path, facts = put(tmp_path, good("a")), (tmp_path / FILE).stat()
    with smelt.load(tmp_path) as checkpoint:
        assert checkpoint.files() == [FileIdentity(path, facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)]


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    put(tmp_path, good("a"), "blob")
    (snapshot / FILE).symlink_to("../../blob")
    with smelt.load(snapshot) as checkpoint:
        assert checkpoint["a"].tolist() == [0, 0]


def test_offsets_lead_to_the_bytes(tmp_path: Path) -> None:
    path = put(tmp_path, packed({"b": entry(begin=8, end=16), "a": entry()}, bytes(range(16))))
    with smelt.load(path) as checkpoint:
        content = path.read_bytes()
        for name, array in checkpoint.items():
            info = checkpoint.tensors[name]
            assert content[info.offset : info.offset + info.nbytes] == array.tobytes()


# --- a lazy mapping -------------------------------------------------------------------------------------


def test_membership_and_comparison_read_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with smelt.load(holding({FILE: good("a", "b")})(tmp_path)) as checkpoint:
        monkeypatch.setattr(os, "preadv", None)
        assert "a" in checkpoint
        assert "c" not in checkpoint
        assert list(checkpoint.keys()) == ["a", "b"]
        assert checkpoint == checkpoint
        assert len({checkpoint}) == 1
        assert checkpoint.tensors["a"] == TensorInfo("a", "F32", (2,), FILE, checkpoint.tensors["a"].offset)


def test_sub_byte_types_come_as_packed_bytes(tmp_path: Path) -> None:
    put(tmp_path, packed({"w": entry("F4", (3, 4), 0, 6)}, bytes(range(6))))
    with smelt.load(tmp_path) as checkpoint:
        assert checkpoint["w"].tolist() == [0, 1, 2, 3, 4, 5]


def test_no_such_tensor(tmp_path: Path) -> None:
    with smelt.load(holding({FILE: good("a")})(tmp_path)) as checkpoint, pytest.raises(KeyError):
        checkpoint["b"]


# --- names of models ------------------------------------------------------------------------------------


def test_a_checkpoint_loads_as_itself(tmp_path: Path) -> None:
    with smelt.load(holding({FILE: good("a")})(tmp_path)) as checkpoint:
        assert smelt.load(checkpoint) is checkpoint


@pytest.mark.parametrize("form", ["{}", "{}/", "./{}", "../here/{}", "~/{}"])
def test_local_paths_in_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    home = tmp_path / "here"
    (home / "m0").mkdir(parents=True)
    holding({FILE: good("a")})(home / "m0")
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    with smelt.load(form.format("m0")) as checkpoint:
        assert list(checkpoint) == ["a"]


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("./modle", r"'\./modle': no such file or folder; did you mean 'model'\?"),
        ("/nowhere/model", "no such file or folder$"),
        ("x/y/z", "no such file or folder"),
        ("~/surely/not/there", "no such file or folder"),
        ("~nobody-of-this-name/x", "no such file or folder"),
        ("modle.safetensors", "no such file or folder"),
        ("back\\slash", "no such file or folder"),
        ("new\nline", r"'new\\nline': no such file or folder"),
        ("", "an empty name is no model"),
    ],
)
def test_what_is_plainly_a_path_never_reaches_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pattern: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    monkeypatch.setattr("smelt.checkpoint.hub.fetch", None)
    with pytest.raises(smelt.InputRejected, match=pattern) as caught:
        smelt.load(name)
    assert str(caught.value).isprintable()


def test_path_objects_never_reach_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("smelt.checkpoint.hub.fetch", None)
    with pytest.raises(smelt.InputRejected, match="no such file or folder"):
        smelt.load(Path("owner/name"))


@pytest.mark.parametrize(("name", "revision"), [("m0", "main"), ("m0@main", None)])
def test_local_models_have_no_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, revision: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m0").mkdir()
    holding({FILE: good("a")})(tmp_path / "m0")
    with pytest.raises(smelt.InputRejected, match="'m0' is a local path and has no revision 'main'"):
        smelt.load(name, revision=revision)


def test_a_folder_may_have_an_at_sign(tmp_path: Path) -> None:
    (tmp_path / "m0@main").mkdir()
    with smelt.load(str(holding({FILE: good("a")})(tmp_path / "m0@main"))) as checkpoint:
        assert list(checkpoint) == ["a"]


@given(st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1), st.integers(1, 4), st.data())
def test_a_split_model_equals_the_whole(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], total: int, data: st.DataObject
) -> None:
    """However tensors are spread over shards, with an index or without, they read the same."""
    home = tmp_path_factory.mktemp("split")
    homes = {name: data.draw(st.integers(1, total)) for name in names}
    arrays = {name: np.frombuffer(name.encode() * 8, np.float32) for name in names}
    for number in range(1, total + 1):
        mine = sorted(name for name in names if homes[name] == number)
        header = {name: entry(begin=8 * i, end=8 * i + 8) for i, name in enumerate(mine)}
        put(home, packed(header, b"".join(arrays[name].tobytes() for name in mine)), numbered(number, total))
    if data.draw(st.booleans()):
        put(
            home,
            json.dumps({"weight_map": {name: numbered(homes[name], total) for name in homes}}).encode(),
            INDEX,
        )
    with smelt.load(home) as checkpoint:
        assert list(checkpoint) == sorted(names)
        assert all(np.array_equal(checkpoint[name], arrays[name]) for name in names)

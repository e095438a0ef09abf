"""The safetensors reader: never laxer than the reference reader, and right about every byte it accepts."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import example, given
from hypothesis import strategies as st

import smelt
from smelt.checkpoint import safetensors as reader
from smelt.checkpoint.safetensors import SafetensorsFile, parse_header
from smelt.kernels.dtypes import DTYPES

from .attacks import entry, packed, put

Tensors = list[tuple[str, str, tuple[int, ...]]]

names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
tensors = st.lists(
    st.tuples(names.filter("__metadata__".__ne__), st.sampled_from(sorted(DTYPES)), shapes),
    max_size=5,
    unique_by=lambda t: t[0],
).map(lambda found: [(n, d, s) for n, d, s in found if prod(s) * DTYPES[d].bits % 8 == 0])


def laid_out(wanted: Tensors) -> tuple[dict[str, Any], int]:
    """Header entries of these tensors, one behind the other, and the size of their data."""
    header, position = {}, 0
    for name, dtype, shape in wanted:
        end = position + prod(shape) * DTYPES[dtype].bits // 8
        header[name] = entry(dtype, shape, position, end)
        position = end
    return header, position


def content_of(wanted: Tensors) -> bytes:
    header, size = laid_out(wanted)
    return packed(header, bytes(i % 251 for i in range(size)))


# --- never laxer than the reference reader --------------------------------------------------------------

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 1 << 65)
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["F32", "U8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
snippets = st.sampled_from(
    ["", " ", "\n", "\t", "\0", "0", "-0", "-", "1", "1e0", ".0", "[", "]", "{", "}", ",", ":", '"', "\\", "\\ud800",
     "\\ud83d\\ude00", '"a"', '"a":1,', "null", "true", "NaN", "1e999", "9" * 30, '"__metadata__":{},', '"F32"', "é"]
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A valid file in which an entry, some text, some bytes or the data's length were changed, or nothing."""
    header, size = laid_out(draw(tensors))
    if header and draw(st.integers(0, 3)) == 0:
        victim = draw(st.sampled_from(sorted(header)))
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))
        header[victim][field] = draw(values)
    if draw(st.booleans()):
        strings = st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2)
        header["__metadata__"] = draw(st.one_of(strings, strings, values))
    text = json.dumps(header, ensure_ascii=draw(st.booleans()))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(snippets) + text[at + draw(st.integers(0, 3)) :]
    raw = bytearray(text.encode("utf-8", "surrogatepass"))
    if raw and draw(st.integers(0, 9)) == 0:
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return packed(bytes(raw), bytes(max(0, size + draw(st.sampled_from([0] * 7 + [-1, 1, 8])))))


def ours(path: Path) -> dict[str, tuple[str, list[int], bytes]] | None:
    """What the file holds, or None when it is refused."""
    try:
        file = SafetensorsFile(path)
    except smelt.InputRejected:
        return None
    found = {}
    for name, info in file.header.tensors.items():
        out = np.zeros(info.nbytes, np.uint8)
        file.read(info, 0, out)
        found[name] = (info.dtype, list(info.shape), out.tobytes())
    file.close()
    return found


def theirs(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """What the reference reader finds in it."""
    return {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in safetensors.deserialize(content)}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "f.safetensors"


@given(damaged())
@example(packed(b'{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'))
@example(packed(b'{"w":{"x":"\\ud800","dtype":"F32","shape":[0],"data_offsets":[0,0]}}'))
@example(packed(b'{"w":{"x":[-0,1e5,"\\ud83d\\ude00"],"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'))
def test_accepts_nothing_that_the_reference_refuses(scratch: Path, content: bytes) -> None:
    scratch.write_bytes(content)
    found = ours(scratch)
    assert found is None or found == theirs(content)


@given(tensors)
def test_reads_every_valid_file_as_the_reference_does(scratch: Path, wanted: Tensors) -> None:
    content = content_of(wanted)
    scratch.write_bytes(content)
    assert ours(scratch) == theirs(content)


@given(tensors, st.data())
def test_a_file_cut_short_anywhere_is_refused(scratch: Path, wanted: Tensors, data: st.DataObject) -> None:
    content = content_of(wanted)
    scratch.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert ours(scratch) is None


@pytest.mark.parametrize("padding", ["", " ", "\n\t  "])
def test_padding_behind_the_header_is_no_error(padding: str) -> None:
    raw = json.dumps({"w": entry()}).encode() + padding.encode()
    assert parse_header(raw, 8, "f").tensors["w"].offset == 8 + len(raw)


def test_unknown_fields_are_noticed() -> None:
    header = parse_header(json.dumps({"w": {**entry(), "colour": "red"}}).encode(), 8, "models/f.safetensors")
    assert set(header.tensors) == {"w"}
    assert header.notices == ("'f.safetensors': tensor 'w': the unknown field 'colour' is ignored",)
    assert header.tensors["w"].file == "f.safetensors"


def test_metadata_is_kept() -> None:
    raw = json.dumps({"__metadata__": {"format": "pt", "a": "line\nbreak"}, "w": entry()}).encode()
    assert parse_header(raw, 8, "f").metadata == {"format": "pt", "a": "line\nbreak"}


# --- the bounds of a header, each met and passed by one -------------------------------------------------


def refused(content: bytes, folder: Path) -> str:
    with pytest.raises(smelt.InputRejected) as caught:
        smelt.load(put(folder, content))
    return str(caught.value)


def test_the_length_of_a_header_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = packed({"w": entry()}, bytes(8))
    length = len(content) - 16
    monkeypatch.setattr(reader, "MAX_HEADER", length)
    assert list(smelt.load(put(tmp_path, content))) == ["w"]
    assert f"a header of {length} bytes, {length - 1} are there" in refused(content[: 7 + length], tmp_path)
    monkeypatch.setattr(reader, "MAX_HEADER", length - 1)
    assert f"a header of {length} bytes, at most {length - 1} are accepted" in refused(content, tmp_path)


@pytest.mark.parametrize("spelling", ["data_offsets", "data\\u005foffsets"])
def test_the_number_of_tensors_is_bounded(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {str(number): entry("F32", (0,), 0, 0) for number in range(4)}
    raw = json.dumps({"__metadata__": {}, **entries}).replace("data_offsets", spelling).encode()
    monkeypatch.setattr(reader, "MAX_TENSORS", 4)
    assert len(parse_header(raw, 0, "f").tensors) == 4
    monkeypatch.setattr(reader, "MAX_TENSORS", 3)
    with pytest.raises(smelt.InputRejected, match=r"^'f': the header names more than 3 tensors$"):
        parse_header(raw, 0, "f")


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("n" * 4096, (0,), ""),
        ("\U0001f600" * 1024, (0,), ""),
        ("n" * 4097, (0,), "has a bad name: it has 4097 bytes, at most 4096 are accepted"),
        ("\U0001f600" * 1025, (0,), "has a bad name: it has 4100 bytes, at most 4096 are accepted"),
        ("n", (0,) * 16, ""),
        ("n", (0,) * 17, "has 17 dimensions, at most 16 are accepted"),
        ("n", (0, (1 << 63) - 1), ""),
        ("n", (0, 1 << 62, 2), "whose product overflows 63 bits"),
        ("n", (0, 1 << 63), "whose product overflows 63 bits"),
    ],
)
def test_names_and_shapes_are_bounded(name: str, shape: tuple[int, ...], problem: str) -> None:
    raw = json.dumps({name: entry("U8", shape, 0, 0)}, ensure_ascii=False).encode()
    if problem:
        with pytest.raises(smelt.InputRejected, match=problem):
            parse_header(raw, 0, "f")
    else:
        assert parse_header(raw, 0, "f").tensors[name].shape == shape


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"a": entry(), "b": entry(begin=9, end=17)}, "tensor 'b' leaves a hole of 1 bytes before it"),
        ({"a": entry(), "b": entry(begin=5, end=13)}, "tensor 'b' shares 3 bytes with the one before"),
        ({"a": entry()}, "9 bytes follow the last tensor, expected none"),
        ({"a": entry(end=7)}, "tensor 'a' takes 7 bytes, expected 8 for its dtype and shape"),
        ({"a": entry("F4", (3,), 0, 2)}, r"is F4 of shape \[3\]: its 12 bits do not fill whole bytes"),
        ({"a": entry(begin=10, end=18)}, "ends at data byte 18, the file's data at 17: the file is cut short"),
        ({"a": entry(begin=8, end=0)}, r"has data_offsets \[8, 0\], expected \[begin, end\]"),
    ],
)
def test_tensors_fill_the_data(entries: dict[str, Any], problem: str) -> None:
    with pytest.raises(smelt.InputRejected, match=problem):
        parse_header(json.dumps(entries).encode(), 17, "f")


def test_of_equal_places_the_empty_tensor_comes_first() -> None:
    entries = {"a": entry(), "b": entry("F32", (0,), 0, 0), "c": entry("F32", (0,), 8, 8)}
    assert set(parse_header(json.dumps(entries).encode(), 8, "f").tensors) == set(entries)


# --- reading --------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file of one tensor, 0 to 9999 as F32."""
    data = np.arange(10_000, dtype=np.float32)
    return put(tmp_path, packed({"w": entry("F32", (100, 100), 0, data.nbytes)}, data.tobytes()))


@given(start=st.integers(0, 10_000), count=st.integers(0, 10_000), limit=st.integers(1, 5000))
def test_any_slab_whatever_single_reads_return(
    tmp_path_factory: pytest.TempPathFactory, start: int, count: int, limit: int
) -> None:
    count = min(count, 10_000 - start)
    path = tmp_path_factory.getbasetemp() / "slabs.safetensors"
    if not path.exists():
        put(
            path.parent,
            packed({"w": entry("F32", (10_000,), 0, 40_000)}, np.arange(1e4, dtype="f4").tobytes()),
            path.name,
        )
    whole = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return whole(fd, [buffers[0][:limit]], offset)

    out = np.full(count, -1, np.float32)
    with pytest.MonkeyPatch.context() as patch, smelt.load(path) as checkpoint:
        patch.setattr(os, "preadv", short)
        checkpoint.read("w", start, out)
    np.testing.assert_array_equal(out, np.arange(start, start + count))


def test_threads_read_at_once(model: Path) -> None:
    with smelt.load(model) as checkpoint:
        found: list[float] = []

        def read(start: int) -> None:
            out = np.empty(2500, np.float32)
            for _ in range(20):
                checkpoint.read("w", start, out)
                found.append(float(out.sum()) - sum(range(start, start + 2500)))

        threads = [threading.Thread(target=read, args=(2500 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [0.0] * 80


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (9_999, 2), (10_001, 0)])
def test_a_slab_outside_of_the_tensor_is_a_mistake(model: Path, start: int, count: int) -> None:
    with smelt.load(model) as checkpoint, pytest.raises(ValueError, match="outside of the tensor"):
        checkpoint.read("w", start, np.empty(count, np.float32))


def test_runs_of_a_tensor(model: Path) -> None:
    with smelt.load(model) as checkpoint:
        out = np.empty((3, 5), np.float32)
        for starts in ([9_995, 0, 17], [0, 1, 2]):
            checkpoint.read_runs("w", np.array(starts), out)
            assert out.tolist() == [list(range(start, start + 5)) for start in starts]
        for outside in ([0, 9_996, 1], [0, -1, 3]):
            with pytest.raises(ValueError, match="runs of 5 items outside of"):
                checkpoint.read_runs("w", np.array(outside), out)
        checkpoint.read_runs("w", np.array([], np.int64), out[:0])
        shrink(model)
        with pytest.raises(smelt.OperationFailed, match=r"tensor 'w': .*ends early: no byte at offset \d+, 20 more"):
            checkpoint.read_runs("w", np.array([0, 2000, 3000]), out)


def test_an_input_error_names_file_and_tensor(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with smelt.load(model) as checkpoint:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(
            smelt.OperationFailed, match=r"tensor 'w': cannot read .*model\.safetensors.*Input/output error"
        ) as caught:
            checkpoint.read("w", 0, np.empty(4, np.float32))
    assert caught.value.exit_code == 1
    assert isinstance(caught.value.__cause__, smelt.OperationFailed)


def test_reading_after_close_fails(model: Path, tmp_path: Path) -> None:
    checkpoint = smelt.load(model)
    checkpoint.close()
    checkpoint.close()
    with open(tmp_path / "other", "wb+"), pytest.raises(smelt.OperationFailed, match="Bad file descriptor"):
        checkpoint.read("w", 0, np.empty(4, np.float32))


def test_forgotten_files_are_closed(model: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(20):
        smelt.load(model)
    assert os.listdir("/proc/self/fd") == before


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def shrink(path: Path) -> None:
    os.truncate(path, 5000)


def replace(path: Path) -> None:
    put(path.parent, path.read_bytes(), "new").rename(path)


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("change", [grow, shrink, replace, touch, os.unlink])
def test_a_changed_input_is_noticed(model: Path, change: Callable[[Path], None]) -> None:
    with smelt.load(model) as checkpoint:
        checkpoint.check_unchanged()
        size = model.stat().st_size
        change(model)
        told = {grow: f"from {size} to {size + 1} bytes", shrink: f"from {size} to 5000 bytes", touch: "written to"}
        what = told.get(change, "it was replaced" if change is replace else "No such file")
        with pytest.raises(smelt.OperationFailed, match=rf"model\.safetensors'.*{what}"):
            checkpoint.check_unchanged()


def test_a_truncated_input_is_an_error_not_a_signal(model: Path) -> None:
    with smelt.load(model) as checkpoint:
        shrink(model)
        with pytest.raises(smelt.OperationFailed, match=r"tensor 'w': .*ends early: no byte at offset 5000"):
            checkpoint.read("w", 0, np.empty(10_000, np.float32))


def test_one_read_may_exceed_what_the_system_moves_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux moves at most 0x7ffff000 bytes per call, so no call may ask for more."""
    from smelt import storage

    monkeypatch.setattr(storage, "_MOST", 1000)
    asked: list[int] = []
    whole = os.preadv

    def recorded(fd: int, buffers: list[memoryview], offset: int) -> int:
        asked.append(len(buffers[0]))
        return whole(fd, buffers, offset)

    with smelt.load(model) as checkpoint:
        monkeypatch.setattr(os, "preadv", recorded)
        assert checkpoint["w"].sum() == sum(range(10_000))
    assert asked == [1000] * 40

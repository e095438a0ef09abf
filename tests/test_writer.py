"""The writer: deterministic bytes, whatever the order of the pieces, that every other reader understands."""

from __future__ import annotations

import errno
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

import smelt
from smelt import storage
from smelt.checkpoint import CheckpointWriter, Shard, TensorInfo, plan_shards
from smelt.checkpoint.base import Part
from smelt.checkpoint.writer import ALIGNMENT, plan_file
from smelt.kernels.dtypes import DTYPES

PAIR = [TensorInfo("a", "F32", (2,)), TensorInfo("b", "F32", (2,))]
INDEX = "model.safetensors.index.json"

names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8)
infos = st.builds(
    TensorInfo,
    names.filter("__metadata__".__ne__),
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 6), max_size=3).map(tuple),
).filter(lambda info: info.count * DTYPES[info.dtype].bits % 8 == 0)
plans = st.tuples(st.lists(infos, min_size=1, max_size=8, unique_by=lambda info: info.name), st.integers(1, 600))


def values_of(info: TensorInfo) -> npt.NDArray[Any]:
    """Bits that tell one tensor from another, in the storage type."""
    bits = np.arange(info.nbytes, dtype=np.uint8) * 7 + len(info.name) + ord(info.name[0]) % 97
    return bits.view(DTYPES[info.dtype].storage)


def write(folder: Path, tensors: list[TensorInfo], shard_size: int) -> list[Shard]:
    shards = plan_shards(tensors, shard_size)
    writer = CheckpointWriter(folder, shards)
    for info in tensors:
        writer.write(info.name, 0, values_of(info))
    writer.finish()
    return shards


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the layout -----------------------------------------------------------------------------------------


@given(plans)
def test_shards_take_tensors_in_order_until_full(plan: tuple[list[TensorInfo], int]) -> None:
    tensors, shard_size = plan
    shards = plan_shards(tensors, shard_size)
    order = {info.name: position for position, info in enumerate(tensors)}
    groups = [sorted(order[info.name] for info in shard.tensors) for shard in shards]
    assert [position for group in groups for position in group] == list(range(len(tensors)))
    sizes = [sum(info.nbytes for info in shard.tensors) for shard in shards]
    for shard, size, after in zip(shards, sizes, [*shards[1:], None], strict=True):
        assert size <= shard_size or len(shard.tensors) == 1 or sum(i.nbytes > 0 for i in shard.tensors) == 1
        first = tensors[min(order[info.name] for info in after.tensors)] if after else None
        assert first is None or size + first.nbytes > shard_size
    numbers = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert [shard.file for shard in shards] == (numbers if len(shards) > 1 else ["model.safetensors"])


@given(plans)
def test_data_is_aligned_and_dense(plan: tuple[list[TensorInfo], int]) -> None:
    for shard in plan_shards(*plan):
        position = len(shard.header)
        assert position % ALIGNMENT == 0
        for info in shard.tensors:
            assert (info.file, info.offset) == (shard.file, position)
            assert info.offset % max(1, DTYPES[info.dtype].bits // 8) == 0
            position += info.nbytes
        assert position == shard.size
        assert shard.offsets == {info.name: info.offset for info in shard.tensors}


def test_a_header_is_compact_sorted_and_padded() -> None:
    (shard,) = plan_shards(
        [TensorInfo("b", "BF16", (2, 3)), TensorInfo("é", "F32", ()), TensorInfo("a", "BF16", (1,))], 100
    )
    text = (
        '{"__metadata__":{"format":"pt"},"é":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        '"a":{"dtype":"BF16","shape":[1],"data_offsets":[4,6]},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[6,18]}}'
    ).encode()
    length = struct.unpack("<Q", shard.header[:8])[0]
    assert shard.header[8:].rstrip(b" ") == text
    assert len(shard.header) == 8 + length
    assert len(shard.header) - 8 - len(text) < ALIGNMENT


@pytest.mark.parametrize("reverse", [False, True])
def test_tensors_lie_as_the_reference_writer_puts_them(reverse: bool) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save

    codes = sorted((code for code, dtype in DTYPES.items() if dtype.bits >= 8), reverse=reverse)
    tensors = {
        f"{n}{code}": torch.zeros(2, dtype=getattr(torch, DTYPES[code].value_type)) for code in codes for n in "ba"
    }
    header = save(tensors)[8:]
    reference = [name for name, _ in sorted(_offsets(header).items(), key=lambda item: item[1])]
    (shard,) = plan_shards([TensorInfo(name, name[1:], (2,)) for name in tensors], 1 << 20)
    assert list(shard.offsets) == reference


def _offsets(header: bytes) -> dict[str, int]:
    entries, _ = json.JSONDecoder().raw_decode(header.decode("latin-1"))
    return {name: value["data_offsets"][0] for name, value in entries.items()}


def test_a_name_given_twice_is_a_mistake() -> None:
    for plan in (lambda twins: plan_shards(twins, 100), lambda twins: plan_file("f", twins)):
        with pytest.raises(ValueError, match="given twice"):
            plan([TensorInfo("a", "F32", (1,)), TensorInfo("a", "F32", (2,))])


def test_one_file_of_a_name() -> None:
    (shard,) = plan_shards(PAIR, 100)
    named = plan_file("x/y.safetensors", PAIR)
    assert (named.file, named.header, named.size, named.offsets) == (
        "x/y.safetensors", shard.header, shard.size, shard.offsets,
    )  # fmt: skip
    assert {tensor.file for tensor in named.tensors} == {"x/y.safetensors"}


def test_a_header_that_no_reader_would_take_is_refused() -> None:
    tensors = [TensorInfo(f"{number}{'n' * 4000}", "U8", (0,)) for number in range(25_000)]
    with pytest.raises(smelt.UsageError, match="too many for one header: ask for smaller shards"):
        plan_shards(tensors, 100)


def test_a_header_is_bounded_as_readers_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (shard,) = plan_shards(PAIR, 100)
    for name, limit in (("MAX_TENSORS", 2), ("MAX_HEADER", len(shard.header) - 8)):
        with monkeypatch.context() as patch:
            patch.setattr(f"smelt.checkpoint.writer.{name}", limit)
            assert plan_shards(PAIR, 100) == [shard]
            patch.setattr(f"smelt.checkpoint.writer.{name}", limit - 1)
            with pytest.raises(smelt.UsageError, match=r"model.safetensors would hold 2 tensors, too many"):
                plan_shards(PAIR, 100)


def test_parts_have_files_of_their_own(tmp_path: Path) -> None:
    """A tensor is of the part with the longest prefix; its file's header and index leave that out."""
    parts = [Part("unet"), Part("unet.deep", "odd"), Part("vae", "diffusion_pytorch_model")]
    names = ["unet.b", "unet.deep.a", "unet.a"]
    tensors = [TensorInfo(name, "F32", (2,)) for name in names]
    shards = plan_shards(tensors, 8, {"made": "here"}, parts)
    files = [
        "unet/model-00001-of-00002.safetensors",
        "unet/model-00002-of-00002.safetensors",
        "unet.deep/odd.safetensors",
    ]
    assert [(shard.file, list(shard.offsets)) for shard in shards] == [
        (files[0], ["unet.b"]), (files[1], ["unet.a"]), (files[2], ["unet.deep.a"]),
    ]  # fmt: skip
    writer = CheckpointWriter(tmp_path, shards)
    for number, info in enumerate(tensors):
        writer.write(info.name, 0, np.full(2, number, np.float32))
    writer.finish()
    index = json.loads((tmp_path / "unet" / INDEX).read_text())
    assert index["weight_map"] == {"a": files[1][5:], "b": files[0][5:]}
    with smelt.load(tmp_path / "unet") as part, smelt.load(tmp_path / "unet.deep") as deep:
        assert {name: array.tolist() for name, array in part.items()} == {"a": [2, 2], "b": [0, 0]}
        assert deep["a"].tolist() == [1, 1]
        assert deep.metadata == {"format": "pt", "made": "here"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unet", "unet.deep"]
    assert [shard.file for shard in plan_shards([], 8, parts=[Part("vae")])] == ["vae/model.safetensors"]
    with pytest.raises(smelt.UsageError, match=r"tensor 'else' belongs to none of the parts unet, unet.deep, vae"):
        plan_shards([*tensors, TensorInfo("else", "F32", ())], 8, parts=parts)


# --- the files ------------------------------------------------------------------------------------------


@given(plans)
def test_the_reference_reader_finds_every_bit(
    tmp_path_factory: pytest.TempPathFactory, plan: tuple[list[TensorInfo], int]
) -> None:
    folder = tmp_path_factory.mktemp("written")
    write(folder, *plan)
    found = {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for path in folder.glob("*.safetensors")
        for name, tensor in safetensors.deserialize(path.read_bytes())
    }
    assert found == {i.name: (i.dtype, i.shape, values_of(i).tobytes()) for i in plan[0]}


@given(plans)
def test_what_is_written_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, plan: tuple[list[TensorInfo], int]
) -> None:
    folder = tmp_path_factory.mktemp("written")
    planned = {info.name: info for shard in write(folder, *plan) for info in shard.tensors}
    with smelt.load(folder) as checkpoint:
        assert checkpoint.tensors == dict(sorted(planned.items()))
        assert checkpoint.metadata == {"format": "pt"}
        assert all(array.tobytes() == values_of(planned[name]).tobytes() for name, array in checkpoint.items())


@given(plans, st.randoms(use_true_random=False))
def test_pieces_in_any_order_from_any_thread_give_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, plan: tuple[list[TensorInfo], int], random: Any
) -> None:
    whole, pieces = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("pieces")
    tensors, shard_size = plan
    write(whole, tensors, shard_size)
    writer = CheckpointWriter(pieces, plan_shards(tensors, shard_size))
    jobs = [(i.name, at, values_of(i)[at : at + 5]) for i in tensors for at in range(0, len(values_of(i)), 5)]
    random.shuffle(jobs)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: writer.write(*job), jobs))
    writer.finish()
    assert contents(pieces) == contents(whole)


def test_the_index_of_several_shards(tmp_path: Path) -> None:
    write(tmp_path, [TensorInfo("b", "BF16", (4,)), TensorInfo("a", "F32", (3,))], 8)
    assert (tmp_path / INDEX).read_text() == json.dumps(
        {
            "metadata": {"total_parameters": 7, "total_size": 20},
            "weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"},
        },
        indent=2,
    ) + "\n"  # fmt: skip


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    write(tmp_path, [TensorInfo("a", "F32", (3,))], 8)
    assert sorted(contents(tmp_path)) == ["model.safetensors"]


def test_transformers_style_loading(tmp_path: Path) -> None:
    """Frameworks memory-map the shards: bfloat16, sharded, through the reference library's own front door."""
    torch = pytest.importorskip("torch")
    write(tmp_path, [TensorInfo("b", "BF16", (4, 2)), TensorInfo("a", "F32", (3,))], 8)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    for name, code in (("a", torch.int32), ("b", torch.int16)):
        with safetensors.safe_open(tmp_path / weight_map[name], "pt") as file:
            assert file.metadata() == {"format": "pt"}
            info = TensorInfo(name, "BF16" if name == "b" else "F32", tuple(file.get_tensor(name).shape))
            assert file.get_tensor(name).reshape(-1).view(code).numpy().tobytes() == values_of(info).tobytes()


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path, [TensorInfo("b", "BF16", (4,)), TensorInfo("a", "F32", (3,))], 8)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


# --- when it goes wrong ---------------------------------------------------------------------------------


def test_a_full_disk_fails_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = os.posix_fallocate

    def full(fd: int, offset: int, length: int) -> None:
        if len(list(tmp_path.iterdir())) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(
        smelt.OperationFailed, match=r"no space for .*00002-of-00002.*bytes needed, \d+ free: No space left"
    ):
        CheckpointWriter(tmp_path, plan_shards(PAIR, 8))
    assert os.listdir("/proc/self/fd") == before
    assert sorted(contents(tmp_path)) == ["model-00001-of-00002.safetensors"]


def test_existing_files_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(smelt.OperationFailed, match="File exists"):
        CheckpointWriter(tmp_path, plan_shards(PAIR, 100))
    assert contents(tmp_path) == {"model.safetensors": b"mine"}


def test_an_unfinished_checkpoint_does_not_finish(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, plan_shards(PAIR, 100))
    writer.write("a", 0, np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="8 bytes too few"):
        writer.finish()
    writer.abort()
    writer.abort()


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (1, 2), (3, 0)])
def test_a_piece_outside_of_its_tensor_is_a_mistake(tmp_path: Path, start: int, count: int) -> None:
    writer = CheckpointWriter(tmp_path, plan_shards(PAIR, 100))
    with pytest.raises(ValueError, match="outside of the tensor"):
        writer.write("a", start, np.zeros(count, np.float32))
    writer.abort()


def test_a_failed_flush_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    writer = CheckpointWriter(tmp_path, plan_shards(PAIR, 8))
    for info in PAIR:
        writer.write(info.name, 0, values_of(info))
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(smelt.OperationFailed, match=r"cannot sync .*00001-of-00002.*Input/output error"):
        writer.finish()
    writer.abort()
    assert INDEX not in contents(tmp_path)


def test_what_is_there_already_is_taken_up(tmp_path: Path) -> None:
    """What was written before stays and can be read again; what is skipped is not missed."""
    shards = plan_shards(PAIR, 8)
    writer = CheckpointWriter(tmp_path, shards)
    writer.write("b", 1, np.full(1, 7, np.float32))
    writer.abort()
    with pytest.raises(smelt.OperationFailed, match="File exists"):
        CheckpointWriter(tmp_path, shards)
    writer, out = CheckpointWriter(tmp_path, shards, again=True), np.empty(1, np.float32)
    writer.read("b", 1, out)
    assert out.tolist() == [7]
    writer.skip("b")
    written = np.array([1, 2], np.float32)
    assert writer.write("a", 0, written) is written
    writer.finish()
    with smelt.load(tmp_path) as checkpoint:
        assert {name: array.tolist() for name, array in checkpoint.items()} == {"a": [1, 2], "b": [0, 7]}


def test_all_files_and_folders_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
    shards = plan_shards([TensorInfo(f"{part}.{name}", "U8", (1,)) for part in "pq" for name in "ab"], 1,
                         parts=[Part("p"), Part("q")])  # fmt: skip
    writer = CheckpointWriter(tmp_path, shards)
    writer.sync()
    assert sorted(synced) == sorted([*(shard.file[2:] for shard in shards), "p", "q"])
    writer.abort()


def test_the_disk_is_asked_to_begin_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(storage, "start_writeback", lambda fd, offset, length: asked.append(fd))
    monkeypatch.setattr("smelt.checkpoint.writer._WRITEBACK", 1000)
    info = TensorInfo("a", "F32", (1000,))
    writer = CheckpointWriter(tmp_path, plan_shards([info], 1 << 20))
    for start in range(0, 1000, 50):
        writer.write("a", start, values_of(info)[start : start + 50])
    writer.finish()
    assert len(asked) == 4

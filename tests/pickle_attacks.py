"""Pickled weights that are wrong, or would run something: section H of the bad inputs."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from collections.abc import Callable

import numpy as np

from tests.attacks import Attack, put
from tests.pickled import mapping, number, pickled, save, tensor, text

FILE, OTHER = "pytorch_model.bin", "model.ckpt"
WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4)
DATA = {"data/0": WEIGHTS.tobytes()}


ONE = mapping({"w": tensor("0", (3, 4))})

#: Name -> instructions, what the message must match. The file has one storage of twelve floats.
CONTENTS: dict[str, tuple[bytes, str]] = {
    "H126-system": (b"cos\nsystem\n" + b"(" + text("true") + b"tR", "names 'os.system'.*may be an attack"),
    "H126-posix-by-stack": (text("posix") + text("system") + b"\x93" + text("x") + b"\x85R", "names 'posix.system'"),
    "H126-a-tensor-that-runs": (mapping({"w": b"cbuiltins\nexec\n" + text("1") + b"\x85R"}), "names 'builtins.exec'"),
    "H127-getattr": (b"cbuiltins\ngetattr\n", "names 'builtins.getattr'"),
    "H127-a-module-of-torch": (b"ctorch.nn.modules.linear\nLinear\n)\x81}b", "an object of 'torch.nn.*state_dict"),
    "H127-torch-load-is-not-called": (b"ctorch\nload\n" + text("x") + b"\x85R", "an object of 'torch.load'"),
    "H127-sparse-tensor": (
        mapping({"w": b"ctorch._utils\n_rebuild_sparse_tensor\n)R"}),
        "'w' is an object of 'torch._utils._rebuild_sp",
    ),
    "H129-stride-0": (mapping({"w": tensor("0", (10**9,), (0,), count=12)}), "repeats its elements"),
    "H129-overlapping": (mapping({"w": tensor("0", (5, 4), (2, 1), count=12)}), "repeats its elements"),
    "H130-too-large": (mapping({"w": tensor("0", (4, 4), count=12)}), "exceeds its record of 48 bytes"),
    "H130-storage-too-large": (mapping({"w": tensor("0", (3, 4), count=13)}), "13 elements exceeds record data/0"),
    "H130-huge": (mapping({"w": tensor("0", (2**40, 2**40), count=12)}), "exceeds its record"),
    "H130-behind-the-end": (mapping({"w": tensor("0", (3, 4), offset=1)}), "exceeds its record"),
    "H130-no-such-record": (mapping({"w": tensor("7", (3, 4))}), "lacks the record 'data/7'"),
    "H130-negative": (mapping({"w": tensor("0", (-1, 4), count=12)}), "whole numbers from 0 on"),
    "H130-negative-stride": (mapping({"w": tensor("0", (3, 4), (-4, 1), offset=8)}), "whole numbers from 0 on"),
    "H130-too-many-axes": (mapping({"w": tensor("0", (1,) * 17, count=12)}), "no short tuple"),
    "H134-list": (b"](" + tensor("0", (3, 4)) + b"e", "holds a list, expected a dictionary of tensors"),
    "H134-one-tensor": (tensor("0", (3, 4)), "holds a tensor, expected a dictionary"),
    "H134-nested": (mapping({"a": ONE}), "'a' is a dict, expected a tensor"),
    "H134-two-wrappers": (mapping({"model": ONE, "state_dict": ONE}), "several state dicts: 'state_dict', 'model'"),
    "H134-numbers-for-names": (b"}" + number(1) + tensor("0", (3, 4)) + b"s", "key '1' is no text"),
    "H134-empty": (b"}", "holds 0 tensors"),
    "name-with-escape": (mapping({"\x1b[31m": tensor("0", (3, 4))}), "cannot be printed"),
    "unknown-instruction": (b"I1\n", "instruction b'I', which torch does not write"),
    "ends-early": (b"X\xff\xff\xff\xff", "ends early"),
    "nothing-on-the-stack": (b"R", "is not a whole file"),
    "no-mark": (b"t", "lacks a mark"),
    "call-of-a-text": (text("print") + text("x") + b"\x85R", "calls what is no function"),
    "attributes-of-a-function": (b"ccollections\nOrderedDict\n}b", "attributes to what has none"),
    "unknown-storage": (text("x") + b"Q", "is not a whole file"),
    "deep-key": (b"}" + b")" + b"\x85" * 200_000 + b"Ns", "key that is a tuple"),
    "distant-memory": (b"j\xff\xff\xff\xff", "is not a whole file"),
    "far-memory": (b"Nr\xff\xff\xff\xff", "holds a NoneType"),
}


def plain() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(ONE))
        archive.writestr("archive/data/0", DATA["data/0"])
    return out.getvalue()


def zipped(*entries: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return out.getvalue()


def patched(find: bytes, replacement: bytes, occurrence: int = 0) -> bytes:
    """The plain file with some bytes replaced."""
    whole, place = plain(), -1
    for _ in range(occurrence + 1):
        place = whole.index(find, place + 1)
    return whole[:place] + replacement + whole[place + len(replacement) :]


def twice() -> bytes:
    with warnings.catch_warnings(action="ignore"):
        return zipped(("archive/data.pkl", pickled(ONE)), ("archive/data.pkl", pickled(b"}")))


def overlapping() -> bytes:
    """The second record's entry says that it is as long as both."""
    whole = plain()
    place = whole.rindex(b"PK\1\2")
    return whole[: place + 20] + struct.pack("<II", 4000, 4000) + whole[place + 28 :]


DATA_PKL = ("archive/data.pkl", pickled(ONE))
PROGRAM = zipped(("archive/constants.pkl", b""), ("archive/data.pkl", pickled(b"N")))
ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "H128-compressed": (lambda: zipped(DATA_PKL, method=zipfile.ZIP_DEFLATED), "'archive/data.pkl' is compressed"),
    "H131-leads-elsewhere": (lambda: zipped(DATA_PKL, ("archive/../x", b"")), "no file in the folder 'archive'"),
    "H131-absolute": (lambda: zipped(DATA_PKL, ("/etc/passwd", b"")), "no file in the folder"),
    "H131-two-folders": (lambda: zipped(DATA_PKL, ("other/data/0", b"")), "no file in the folder"),
    "H131-twice": (twice, "'archive/data.pkl' is there twice"),
    "H131-two-archives": (lambda: plain() + plain(), "not where it should be|overlap"),
    "H131-something-before": (lambda: b"#!/bin/sh\n" + plain(), "not where it should be"),
    "H131-something-behind": (lambda: plain() + b"x", "does not end as a zip archive"),
    "H131-overlapping": (overlapping, "overlap, or something lies between"),
    "H131-another-name-inside": (lambda: patched(b"archive/data/0", b"archive/data/1"), "not where the directory"),
    "H131-directory-elsewhere": (lambda: plain()[:-6] + b"\xf0\0\0\0\0\0", "not where it should be"),
    "H132-legacy": (lambda: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." * 50, "is of the format of torch before 1.6"),
    "H132-tar": (lambda: b"storages\0" + bytes(1015), "does not end as a zip archive"),
    "H133-gzip": (lambda: b"\x1f\x8b\x08" + bytes(100), "does not end as a zip archive"),
    "H133-7z": (lambda: b"7z\xbc\xaf\x27\x1c" + bytes(100), "does not end as a zip archive"),
    "H135-program": (lambda: PROGRAM, "is a program of torch.jit"),
    "empty": (lambda: b"", "too short for a zip archive"),
    "no-pickle": (lambda: zipped(("archive/version", b"3")), "lacks the record 'data.pkl'"),
    "big-endian": (lambda: zipped(DATA_PKL, ("archive/byteorder", b"big")), "big-endian"),
    "safetensors": (lambda: struct.pack("<Q", 2) + b"{}" + bytes(30), "does not end as a zip archive"),
}


def _contents(name: str, instructions: bytes, pattern: str) -> Attack:
    return Attack(
        _named(name), lambda folder: save(folder / FILE, instructions, DATA), pattern, (FILE,), 3, ("--allow-pickle",)
    )


def _archive(name: str, make: Callable[[], bytes], pattern: str) -> Attack:
    return Attack(_named(name), lambda folder: put(folder, make(), OTHER), pattern, (OTHER,), 3, ("--allow-pickle",))


def _named(name: str) -> str:
    return name if name.startswith("H") else f"H-{name}"


ATTACKS = [
    *(_contents(name, *row) for name, row in CONTENTS.items()),
    *(_archive(name, *row) for name, row in ARCHIVES.items()),
]

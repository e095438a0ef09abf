"""The physical floor of a merge, as a program of its own: no arithmetic, only the bytes that must move.

    python benchmarks/floor.py OUT MODEL... [--overlap]

Every byte of every input is read once into one reused buffer; then as many bytes as the first model has
are written, from memory, into preallocated files of the same names and sizes; files and folder are
synced. The plain program, which the ratios refer to, does one thing after the other. With ``--overlap``
one thread reads while another writes, as a good merge program does.

It imports nothing but the standard library, so that its start costs as little as a program can cost.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from threading import Thread

BUFFER = 8 << 20


def read_all(folders: list[Path]) -> None:
    buffer = bytearray(BUFFER)
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            read_file(path, buffer)


def read_file(path: Path, buffer: bytearray) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        offset = 0
        while count := os.preadv(descriptor, [buffer], offset):
            offset += count
    finally:
        os.close(descriptor)


def write_all(out: Path, model: Path) -> None:
    """Write files of the names and sizes of ``model`` into the new folder ``out``, and sync."""
    out.mkdir(parents=True)
    data = memoryview(os.urandom(1 << 20) * (BUFFER >> 20))
    for path in sorted(model.glob("*.safetensors")):
        write_file(out / path.name, path.stat().st_size, data)
    descriptor = os.open(out, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_file(path: Path, size: int, data: memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        os.posix_fallocate(descriptor, 0, size)
        offset = 0
        while offset < size:
            offset += os.pwrite(descriptor, data[: size - offset], offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main() -> None:
    overlap = "--overlap" in sys.argv
    out, *models = (Path(argument) for argument in sys.argv[1:] if argument != "--overlap")
    reader = Thread(target=read_all, args=(models,))
    reader.start()
    if not overlap:
        reader.join()
    write_all(out, models[0])
    reader.join()


if __name__ == "__main__":
    main()

"""What a disk may hold after the power failed: a model of it, fed with the operations of a real run.

Data reaches the disk for certain when its file is synced, a name when the folder that holds it is. What was not
synced may be there or not, in any order; a write may be there in part, in pages of 4 KiB; an operation on names is
there wholly or not at all. That is weaker than what journaling file systems give.
"""

from __future__ import annotations

import os
import pickle
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

PAGE = 4096

#: ("create", folder, name, node, "file" or "folder"), ("write", node, offset, data), ("size", node, bytes),
#: ("remove", folder, name), ("move", folder, name, folder, name), ("swap", the same), ("sync", node)
Operation = tuple[Any, ...]


class Recorder:
    """Writes down every change of the file system that storage makes below a folder, while making it."""

    def __init__(self, home: str) -> None:
        self._home = home
        self._nodes: dict[int, int] = {}
        self._numbers = count()
        self.operations: list[Operation] = []
        self.before = _tree(Path(home), self.node)

    def node(self, path: Any, new: bool = False, dir_fd: int | None = None) -> int:
        """A number for a file or folder, whatever its name; ``new``: the inode's number may have had an owner."""
        place = os.stat(path) if isinstance(path, int) else os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        if new or place.st_ino not in self._nodes:
            self._nodes[place.st_ino] = next(self._numbers)
        return self._nodes[place.st_ino]

    def save(self, path: str) -> None:
        Path(path).write_bytes(pickle.dumps((self.before, self.operations)))

    def install(self) -> Recorder:
        from smelt import storage

        for name in ("open", "pwrite", "posix_fallocate", "ftruncate", "mkdir", "unlink", "rmdir", "rename", "fsync"):
            setattr(os, name, getattr(self, f"_{name}")(getattr(os, name)))
        exchange: Callable[..., Any] = storage._exchange

        def swap(one: Path, other: Path) -> bool:
            done = bool(exchange(one, other))
            if done:
                self._note("swap", *self._place(one), *self._place(other))
            return done

        storage._exchange = swap
        return self

    def _note(self, *operation: Any) -> None:
        self.operations.append(operation)

    def _place(self, path: Any, dir_fd: int | None = None) -> tuple[int, str]:
        """The folder's number, and the name in it."""
        if dir_fd is not None:
            return self.node(dir_fd), os.fspath(path)
        folder, name = os.path.split(os.fspath(path))
        return self.node(folder), name

    def _ours(self, path: Any) -> bool:
        return os.fspath(path).startswith(self._home)

    def _open(self, real: Any) -> Any:
        def call(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            new = bool(flags & os.O_CREAT) and self._ours(path) and not os.path.lexists(path)
            descriptor: int = real(path, flags, mode, dir_fd=dir_fd)
            if new:
                self._note("create", *self._place(path), self.node(descriptor, new=True), "file")
            return descriptor

        return call

    def _pwrite(self, real: Any) -> Any:
        def call(descriptor: int, data: Any, offset: int) -> int:
            done: int = real(descriptor, data, offset)
            self._note("write", self.node(descriptor), offset, bytes(data[:done]))
            return done

        return call

    def _posix_fallocate(self, real: Any) -> Any:
        def call(descriptor: int, offset: int, size: int) -> None:
            real(descriptor, offset, size)
            self._note("size", self.node(descriptor), os.fstat(descriptor).st_size)

        return call

    def _ftruncate(self, real: Any) -> Any:
        def call(descriptor: int, size: int) -> None:
            real(descriptor, size)
            self._note("size", self.node(descriptor), size)

        return call

    def _mkdir(self, real: Any) -> Any:
        def call(path: Any, mode: int = 0o777) -> None:
            real(path, mode)
            self._note("create", *self._place(path), self.node(path, new=True), "folder")

        return call

    def _unlink(self, real: Any) -> Any:
        def call(path: Any, *, dir_fd: int | None = None) -> None:
            place = self._place(path, dir_fd)
            real(path, dir_fd=dir_fd)
            self._note("remove", *place)

        return call

    _rmdir = _unlink

    def _rename(self, real: Any) -> Any:
        def call(one: Any, other: Any) -> None:
            places = (*self._place(one), *self._place(other))
            real(one, other)
            self._note("move", *places)

        return call

    def _fsync(self, real: Any) -> Any:
        def call(descriptor: int) -> None:
            real(descriptor)
            self._note("sync", self.node(descriptor))

        return call


@dataclass
class Tree:
    """Folders as name -> number, files as their contents, by number. ``root`` is where it begins."""

    root: int = 0
    folders: dict[int, dict[str, int]] = field(default_factory=dict)
    files: dict[int, bytearray] = field(default_factory=dict)

    def write_to(self, path: Path) -> None:
        path.mkdir()
        self._write(self.root, path)

    def _write(self, folder: int, path: Path) -> None:
        for name, node in self.folders[folder].items():
            if node in self.folders:
                (path / name).mkdir()
                self._write(node, path / name)
            else:
                (path / name).write_bytes(self.files[node])


def _tree(home: Path, number: Callable[[Path], int]) -> Tree:
    found = Tree(number(home))
    for folder in [home, *(path for path in home.rglob("*") if stat.S_ISDIR(path.lstat().st_mode))]:
        found.folders[number(folder)] = {path.name: number(path) for path in folder.iterdir()}
        found.files |= {number(path): bytearray(path.read_bytes()) for path in folder.iterdir() if path.is_file()}
    return found


class Crash:
    """The disk after ``operations``, as far as luck has it."""

    def __init__(self, before: Tree, operations: list[Operation], luck: random.Random) -> None:
        self._tree = Tree(before.root, {n: dict(f) for n, f in before.folders.items()},
                          {n: bytearray(data) for n, data in before.files.items()})  # fmt: skip
        self._luck = luck
        self._kept = luck.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        self._data: dict[int, list[Operation]] = {}
        self._names: list[tuple[Operation, set[int]]] = []
        for operation in operations:
            self._take(operation)

    def _take(self, operation: Operation) -> None:
        kind, node = operation[:2]
        if kind == "sync":
            for waiting in self._data.pop(node, ()):
                self._apply_data(waiting, torn=False)
            for _, folders in self._names:
                folders.discard(node)
        elif kind in ("write", "size"):
            self._data.setdefault(node, []).append(operation)
        else:
            self._names.append((operation, {node, operation[3]} if kind in ("move", "swap") else {node}))
            if kind == "create":
                made: dict[int, Any] = self._tree.folders if operation[4] == "folder" else self._tree.files
                made[operation[3]] = {} if operation[4] == "folder" else bytearray()

    def tree(self) -> Tree:
        for operation, folders in self._names:
            if not folders or self._luck.random() < self._kept:
                self._apply_name(*operation)
        for waiting in self._data.values():
            for operation in self._luck.sample(waiting, len(waiting)):
                if self._luck.random() < self._kept:
                    self._apply_data(operation, torn=self._luck.random() < 0.5)
        return self._tree

    def _apply_data(self, operation: Operation, torn: bool) -> None:
        kind, node, *rest = operation
        data = self._tree.files[node]
        if kind == "size":
            del data[rest[0] :]
            data.extend(bytes(rest[0] - len(data)))
            return
        offset, written = rest
        for start in range(0, len(written), PAGE):
            if not torn or self._luck.random() < 0.5:
                end = offset + min(start + PAGE, len(written))
                data.extend(bytes(max(0, end - len(data))))
                data[offset + start : end] = written[start : start + PAGE]

    def _apply_name(self, kind: str, folder: int, name: str, *more: Any) -> None:
        folders = self._tree.folders
        if kind == "create":
            folders[folder][name] = more[0]
        elif kind == "remove":
            folders[folder].pop(name, None)
        elif kind == "move" and name in folders[folder]:
            folders[more[0]][more[1]] = folders[folder].pop(name)
        elif kind == "swap" and name in folders[folder] and more[1] in folders[more[0]]:
            one, other = folders[folder][name], folders[more[0]][more[1]]
            folders[folder][name], folders[more[0]][more[1]] = other, one


def crash(before: Tree, operations: list[Operation], luck: random.Random) -> Tree:
    """The disk after a power cut at a random moment of a recorded run."""
    return Crash(before, operations[: luck.randint(0, len(operations))], luck).tree()

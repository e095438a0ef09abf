"""From what a user names to a checkpoint: a path, a hub id, or a dict of arrays."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from .. import storage
from ..errors import InputRejected, show
from . import hub
from .base import Checkpoint
from .folder import FolderCheckpoint
from .memory import MemoryCheckpoint, of_module
from .pipeline import PipelineCheckpoint, layout_of
from .place import LocalPlace, is_url
from .quantisation import is_quantised
from .selection import ADAPTER, DIFFUSERS_ADAPTER, gguf_file
from .side import SideFiles

# Formats are imported by whoever meets one: most runs meet safetensors alone.
if TYPE_CHECKING:
    from .adapter import Adapter


def load(
    source: str | Path | Mapping[str, Any] | Any, *, revision: str | None = None, label: str | None = None,
    allow_pickle: bool = False, as_stored: bool = False,
) -> Checkpoint:  # fmt: skip
    """Open a checkpoint lazily: a folder, one file of weights, a hub id, a URL, a dict of arrays, or a module.

    ``base+adapter`` is the base with a PEFT adapter (a folder or hub id) applied; see also :func:`load_adapted`.

    A ``torch.nn.Module`` stands for its ``state_dict()``, and for its ``config`` where it has one. Quantised
    weights are shown as what they stand for, unless ``as_stored``.

    An existing path is a path, whatever it looks like; the hub is asked only about other names.
    ``owner/name@revision`` and ``revision=`` are the same. A URL (hf://, https://, s3://) is read by ranges, nothing
    is downloaded whole. ``allow_pickle``: read pickled weights, too, where there are no others (but not behind URLs):
    their tensors alone, and nothing in them is run. Raises InputRejected when it is not a checkpoint, OperationFailed
    when reading or downloading it fails.
    """
    opened = _opened(source, revision, label, allow_pickle)
    if as_stored or opened is source:
        return opened
    try:
        return _dequantised(opened)
    except BaseException:
        opened.close()
        raise


def _dequantised(opened: Checkpoint) -> Checkpoint:
    if not is_quantised(opened):
        return opened
    from .quantised import dequantised

    return dequantised(opened)


def _opened(source: Any, revision: str | None, label: str | None, allow_pickle: bool) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping):
        return MemoryCheckpoint(source, label or "arrays")
    if callable(getattr(source, "state_dict", None)):
        return of_module(source, label or type(source).__name__)
    text = str(source)
    if is_url(text):
        from .remote import RemoteCheckpoint

        return RemoteCheckpoint(text, revision, label)
    path = _path(text)
    if storage.exists(path):
        return _on_disk(_without_revision(path, revision), label or text, None, allow_pickle)
    name, _, named = text.partition("@")
    if named and storage.exists(_path(name)):
        return _on_disk(_without_revision(_path(name), named), label or text, None, allow_pickle)
    base, plus, adapter = text.partition("+")
    if plus and base and adapter and not isinstance(source, Path):
        return load_adapted(
            load(base, revision=revision, allow_pickle=allow_pickle), [(open_adapter(adapter), 1.0)], label or text
        )
    if isinstance(source, Path) or not hub.is_id(name):
        raise InputRejected(f"{show(text, 1000)}: no such file or folder{_near(path)}")
    return _from_hub(name, revision or named or None, label or text, path, allow_pickle)


def _on_disk(path: Path, label: str, commit: str | None, allow_pickle: bool) -> Checkpoint:
    """A file, a folder, or a folder of several models."""
    gguf = gguf_file(path)
    if gguf is not None:
        from .gguf import GgufCheckpoint

        return GgufCheckpoint(gguf, label)
    layout = layout_of(path) if storage.is_folder(path) else None
    if layout is None:
        return FolderCheckpoint(path, label, commit, allow_pickle=allow_pickle)
    with ExitStack() as stack:
        opened = {
            folder: stack.enter_context(FolderCheckpoint(path / folder, None, commit, allow_pickle=allow_pickle))
            for folder in layout.weighted
        }
        made = PipelineCheckpoint(path, layout, opened, label)
        made.revision = commit
        stack.pop_all()
    return made


def load_adapted(base: Checkpoint, adapters: Sequence[tuple[Adapter, float]], label: str) -> Checkpoint:
    """``base`` with adapters, each with its weight, as one checkpoint that is computed while it is read.

    It owns them and closes them. Raises InputRejected when an adapter does not fit.
    """
    from .adapter import AdaptedCheckpoint

    try:
        return AdaptedCheckpoint(base, adapters, label)
    except BaseException:
        for opened in (base, *(adapter.file for adapter, _ in adapters)):
            opened.close()
        raise


def is_adapter(source: object) -> TypeGuard[Adapter]:
    """Whether it is an opened adapter."""
    if source is None or isinstance(source, str | Path | Mapping):
        return False
    from .adapter import Adapter

    return isinstance(source, Adapter)


def open_adapter(source: str | Path | Adapter, revision: str | None = None) -> Adapter:
    """Open an adapter: a folder, a file in kohya's or diffusers' naming, or a hub id. Raises as :func:`load`."""
    if is_adapter(source):
        return source
    text = str(source)
    if is_url(text):
        raise InputRejected(f"{show(text, 1000)}: an adapter is not read from a URL: download it and give its folder")
    path = _path(text)
    if storage.exists(path):
        return _adapter_at(_without_revision(path, revision), text)
    name, _, named = text.partition("@")
    if isinstance(source, Path) or not hub.is_id(name):
        raise InputRejected(f"{show(text, 1000)}: no such file or folder{_near(path)}")
    folder, commit = hub.fetch(name, revision or named or None, "adapter")
    return _adapter_at(folder, text, commit)


def _adapter_at(path: Path, label: str, commit: str | None = None) -> Adapter:
    """PEFT's folder, or a single file that needs no config."""
    from .adapter import read_adapter, read_flat

    diffusers = path / DIFFUSERS_ADAPTER
    if storage.is_folder(path) and storage.exists(diffusers):
        path = diffusers
    if storage.is_folder(path) or path.name == ADAPTER:
        return read_adapter(path.parent if path.name == ADAPTER else path, label, commit)
    file = FolderCheckpoint(path, label)
    try:
        return read_flat(file)
    except BaseException:
        file.close()
        raise


def load_adapter(folder: Path) -> Checkpoint:
    """Open the weights of a PEFT adapter's folder, under the names that they have in the file."""
    return FolderCheckpoint(folder, adapter=True)


def side_files(source: str, revision: str | None = None) -> tuple[Mapping[str, bytes], Path | None]:
    """The side files of a model (tokenizer, configs), which need not have weights, and the local folder they lie in.

    Of a hub id only these are downloaded; its folder, and that of a URL, is None. Raises as :func:`load`.
    """
    if is_url(source):
        from .remote import located

        return SideFiles(located(source, revision)[0][0]), None
    path = _path(source)
    if storage.is_folder(path):
        return SideFiles(LocalPlace(_without_revision(path, revision))), path
    if storage.exists(path) or not hub.is_id(source):
        raise InputRejected(f"{show(source, 1000)}: no such folder{_near(path)}")
    return SideFiles(LocalPlace(hub.fetch(source, revision, "side files")[0])), None


def _path(text: str) -> Path:
    if not text:
        raise InputRejected("an empty name is no model: give a folder, a file or owner/name")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # no such user, or no home
        raise InputRejected(f"{show(text)}: no such file or folder: {error}") from error


def _without_revision(path: Path, revision: str | None) -> Path:
    if revision is not None:
        raise InputRejected(f"{storage.shown(path)} is a local path and has no revision {show(revision)}: leave it out")
    return path


def _from_hub(name: str, revision: str | None, label: str, path: Path, allow_pickle: bool) -> Checkpoint:
    try:
        folder, commit = hub.fetch(name, revision, pickled=allow_pickle)
    except InputRejected as error:
        raise type(error)(f"{error}{_near(path)}") from error
    return _on_disk(folder, label, commit, allow_pickle)


def _near(path: Path) -> str:
    """A hint at the names in the parent folder that are close."""
    known = storage.listdir(path.parent) if storage.is_folder(path.parent) else []
    nearest = difflib.get_close_matches(path.name, known, n=3)
    return f"; did you mean {' or '.join(map(show, nearest))}?" if nearest else ""

"""From what a user names to a checkpoint: a path, a hub id, or a dict of arrays."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from .. import storage
from ..errors import InputRejected, show, without_secrets
from . import hub
from .base import Checkpoint
from .folder import FolderCheckpoint
from .memory import MemoryCheckpoint, of_module
from .pipeline import PipelineCheckpoint, inner, layout_of
from .place import LocalPlace, Place, Target, is_url, split, target
from .quantisation import is_quantised
from .selection import ADAPTER, DIFFUSERS_ADAPTER, PICKLED_ADAPTER, gguf_file
from .side import SideFiles

# Formats are imported by whoever meets one: most runs meet safetensors alone.
if TYPE_CHECKING:
    from .adapter import Adapter


def load(
    source: str | Path | Mapping[str, Any] | Any, *, revision: str | None = None, label: str | None = None,
    allow_pickle: bool = False, as_stored: bool = False,
) -> Checkpoint:  # fmt: skip
    """Open a checkpoint lazily: a folder, one file of weights, a hub id, a URL, a dict of arrays, or a module.

    ``base+adapter`` is the base with an adapter (a folder, file, hub id or URL) applied; see also :func:`load_adapted`.

    A ``torch.nn.Module`` stands for its ``state_dict()``, and for its ``config`` where it has one. Quantised
    weights are shown as what they stand for, unless ``as_stored``.

    An existing path is a path, whatever it looks like; the hub is asked only about other names.
    ``owner/name@revision`` and ``revision=`` are the same. A URL (hf://, https://, s3://) is read by ranges, nothing
    is downloaded whole. ``allow_pickle``: read pickled weights, too, where there are no others:
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

    return opened.of_parts(dequantised) if isinstance(opened, PipelineCheckpoint) else dequantised(opened)


def _opened(source: Any, revision: str | None, label: str | None, allow_pickle: bool) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping):
        return MemoryCheckpoint(source, label or "arrays")
    if callable(getattr(source, "state_dict", None)):
        return of_module(source, label or type(source).__name__)
    text = str(source)
    if isinstance(source, str) and (parts := split(text))[1]:
        return _with_adapter(*parts, revision, label, allow_pickle)
    if is_url(text):
        from .remote import located

        return _at(*located(text, revision), label or without_secrets(text), allow_pickle)
    path = _path(text)
    if storage.exists(path):
        return _on_disk(_without_revision(path, revision), label or text, allow_pickle)
    name, _, named = text.partition("@")
    if named and storage.exists(_path(name)):
        return _on_disk(_without_revision(_path(name), named), label or text, allow_pickle)
    base, plus, adapter = text.partition("+")
    if plus and base and adapter and not isinstance(source, Path):
        return _with_adapter(base, adapter, revision, label, allow_pickle)
    if isinstance(source, Path) or not hub.is_id(name):
        raise InputRejected(f"{show(text, 1000)}: no such file or folder{_near(path)}")
    return _from_hub(name, revision or named or None, label or text, path, allow_pickle)


def _with_adapter(base: str, adapter: str, revision: str | None, label: str | None, allow_pickle: bool) -> Checkpoint:
    opened = load(base, revision=revision, allow_pickle=allow_pickle)
    try:
        found = open_adapter(adapter, allow_pickle=allow_pickle)
    except BaseException:
        opened.close()
        raise
    return load_adapted(opened, [(found, 1.0)], label or without_secrets(f"{base}+{adapter}"))


def _on_disk(path: Path, label: str, allow_pickle: bool) -> Checkpoint:
    return _at(target(path), None, label, allow_pickle)


def _at(at: Target, commit: str | None, label: str, allow_pickle: bool) -> Checkpoint:
    """A file, a folder, or a folder of several models."""
    place, file = at
    gguf = gguf_file(place, file)
    if gguf is not None:
        from .gguf import GgufCheckpoint

        return GgufCheckpoint(place, gguf, label, commit)
    layout = layout_of(place) if file is None else None
    if layout is None:
        return FolderCheckpoint(at, label, commit, allow_pickle=allow_pickle)
    with ExitStack() as stack:
        opened = {folder: stack.enter_context(_part(inner(place, folder), allow_pickle)) for folder in layout.weighted}
        made = PipelineCheckpoint(place, layout, opened, label, commit)
        stack.pop_all()
    return made


def _part(place: Place, allow_pickle: bool) -> Checkpoint:
    """One folder of a pipeline."""
    return FolderCheckpoint((place, None), str(place.folder or place.shown()), allow_pickle=allow_pickle)


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


def open_adapter(
    source: str | Path | Adapter, revision: str | None = None, *, allow_pickle: bool = False
) -> Adapter:  # fmt: skip
    """Open an adapter: a folder, a file in kohya's or diffusers' naming, a hub id or a URL. Raises as :func:`load`."""
    if is_adapter(source):
        return source
    text = str(source)
    if is_url(text):
        from .remote import located

        return _adapter_at(*located(text, revision), without_secrets(text), allow_pickle)
    path = _path(text)
    if storage.exists(path):
        return _adapter_at(target(_without_revision(path, revision)), None, text, allow_pickle)
    name, _, named = text.partition("@")
    if isinstance(source, Path) or not hub.is_id(name):
        raise InputRejected(f"{show(text, 1000)}: no such file or folder{_near(path)}")
    folder, commit = hub.fetch(name, revision or named or None, "adapter", pickled=allow_pickle)
    return _adapter_at(target(folder), commit, text, allow_pickle)


def _adapter_at(at: Target, commit: str | None, label: str, allow_pickle: bool) -> Adapter:
    """PEFT's folder, or a single file that needs no config."""
    from .adapter import read_adapter, read_flat

    place, file = at
    if file is None and place.has(DIFFUSERS_ADAPTER):
        file = DIFFUSERS_ADAPTER
    if file in (None, ADAPTER, PICKLED_ADAPTER):
        return read_adapter(place, label, commit, allow_pickle=allow_pickle)
    opened = FolderCheckpoint((place, file), label, commit, allow_pickle=allow_pickle)
    try:
        return read_flat(opened)
    except BaseException:
        opened.close()
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
    return _at(target(folder), commit, label, allow_pickle)


def _near(path: Path) -> str:
    """A hint at the names in the parent folder that are close."""
    known = storage.listdir(path.parent) if storage.is_folder(path.parent) else []
    nearest = difflib.get_close_matches(path.name, known, n=3)
    return f"; did you mean {' or '.join(map(show, nearest))}?" if nearest else ""

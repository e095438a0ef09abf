"""Hub repositories: owner/name at a revision, resolved once to a commit in the local cache.

Only what a model needs is downloaded, and pickled weights only where they are asked for. With ``HF_HUB_OFFLINE`` or
``TRANSFORMERS_OFFLINE`` set, or where the hub cannot be reached, only the cache is consulted.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from .. import storage
from ..errors import InputRejected, OperationFailed, SmeltError, show
from .pipeline import INDICES
from .place import present
from .selection import ADAPTER, PICKLED, PICKLED_ADAPTER, kind_of, nothing_in

_T = TypeVar("_T")

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w./-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json", ".yaml", ".yml")
_ADAPTER_CONFIG = "adapter_config.json"

#: What is downloaded of a repository: weights and side files, side files alone, or an adapter.
What = Literal["model", "side files", "adapter"]
_SIDE_FILES = (".json", ".txt", ".jinja", ".model", "README.md")


def is_id(text: str) -> bool:
    """Whether ``text`` could be a repository: owner/name, or the bare name of an old one."""
    return _ID.fullmatch(text) is not None and not text.endswith(_FILES)


def switched_off() -> str | None:
    """The environment variable that forbids the network, or None."""
    switches = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in switches if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), None)


def fetch(repository: str, revision: str | None, what: What = "model", *, pickled: bool = False) -> tuple[Path, str]:
    """The local snapshot of a repository, downloaded where allowed, and its commit.

    Raises InputRejected when repository or revision does not exist, when it holds no safetensors, when it is
    not in the cache and the hub is out of reach, and when an interrupted download left it unfinished;
    OperationFailed when the download fails.
    """
    where = _named(repository, revision)
    local = bool(switched_off())

    def choose(names: Sequence[str]) -> list[str]:
        return chosen(names, where, what, pickled)

    snapshot = Path(
        _asked(where, lambda: _cached(repository, revision) if local else _downloaded(repository, revision, choose))
    )
    for name in storage.listdir(snapshot):
        present(snapshot / name)
    return snapshot, snapshot.name


def listed(repository: str, revision: str | None) -> tuple[str, list[str], str]:
    """The commit of a repository, the paths of its files, and the URL of its top folder.

    Raises InputRejected when repository or revision does not exist, OperationFailed when the hub fails.
    """
    from huggingface_hub import HfApi, constants, hf_hub_url

    where = _named(repository, revision)
    found = _asked(where, lambda: HfApi(endpoint=constants.ENDPOINT).model_info(repository, revision=revision))
    names = sorted(file.rfilename for file in found.siblings or ())
    if not found.sha or not _COMMIT.fullmatch(found.sha):
        raise OperationFailed(f"{where}: the hub names no commit")
    url = hf_hub_url(repository, "file", revision=found.sha, endpoint=constants.ENDPOINT)
    return found.sha, names, url.removesuffix("/file")


def _named(repository: str, revision: str | None) -> str:
    """How messages name it. InputRejected for what cannot be a revision."""
    where = show(repository if revision is None else f"{repository}@{revision}")
    if revision is not None and _REVISION.fullmatch(revision) is None:
        raise InputRejected(f"{where}: that is no name of a revision")
    return where


def _asked(where: str, question: Callable[[], _T]) -> _T:
    """What the hub library answers; its errors become ours."""
    from huggingface_hub import errors

    try:
        return question()
    except SmeltError:
        raise
    except errors.LocalEntryNotFoundError as error:
        hub = f"{switch} is set" if (switch := switched_off()) else "the hub cannot be reached"
        raise InputRejected(f"{where}: no such folder, and as a hub id not in the local cache ({hub})") from error
    except errors.RevisionNotFoundError as error:
        raise InputRejected(f"{where}: the hub has the repository, but not this revision") from error
    except errors.GatedRepoError as error:
        raise InputRejected(
            f"{where}: the hub wants its terms accepted first; then log in with hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputRejected(f"{where}: no such folder, and no hub repository that you may read") from error
    except errors.HFValidationError as error:
        raise InputRejected(f"{where}: no such folder, and not a hub id") from error
    except Exception as error:  # the HTTP client behind the hub library, and so its errors, differ by version
        raise OperationFailed(f"{where}: the download failed: {show(error)}") from error


def _cached(repository: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    # No pattern asks for no file: whether the snapshot is whole shows when it is opened.
    found: str = snapshot_download(repository, revision=revision, allow_patterns=[], local_files_only=True)
    return found


def _downloaded(repository: str, revision: str | None, choose: Callable[[Sequence[str]], list[str]]) -> str:
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        names = [file.rfilename for file in HfApi().model_info(repository, revision=revision).siblings or ()]
    except (errors.HfHubHTTPError, errors.HFValidationError):
        raise
    except Exception:  # no connection, in the words of whatever HTTP client is used
        return _cached(repository, revision)
    patterns = [glob.escape(name) for name in choose(names)]
    found: str = snapshot_download(repository, revision=revision, allow_patterns=patterns)
    return found


def chosen(names: Sequence[str], where: str, what: What, pickled: bool = False) -> list[str]:
    """Which files of a repository to download. InputRejected when there is not what is wanted."""
    if what != "adapter":
        return wanted(names, where, pickled=pickled) if what == "model" else side_files(names)
    weights = PICKLED_ADAPTER if pickled and ADAPTER not in names else ADAPTER
    if not {weights, _ADAPTER_CONFIG} <= set(names):
        raise InputRejected(f"{where} holds no {weights} and {_ADAPTER_CONFIG}: it is no adapter")
    return [weights, _ADAPTER_CONFIG]


def wanted(names: Sequence[str], where: str, *, pickled: bool = False) -> list[str]:
    """The files of a repository to download: side files and one set of weights, of its top folder only.

    Of a pipeline also those of the folders below. Raises InputRejected when there are no weights that may be read.
    """
    folders: dict[str, list[str]] = {"": []}
    for folder, _, name in (name.rpartition("/") for name in names):
        folders.setdefault(folder, []).append(name)
    top = folders[""]
    if not any(index in top for index in INDICES):
        folders = {"": top}
    found = {folder: _weights_of(inside, pickled) for folder, inside in folders.items() if "/" not in folder}
    for folder, inside in folders.items():
        if not any(found.values()) or (not found.get(folder, True) and _needs_weights(inside)):
            raise nothing_in(f"{where}{f', {show(folder)},' if folder else ''}", inside)
    chosen = {folder: {*weights, *side_files(folders[folder])} for folder, weights in found.items()}
    return sorted(f"{folder}/{name}".lstrip("/") for folder, named in chosen.items() for name in named)


def _needs_weights(names: Sequence[str]) -> bool:
    """Whether a folder is a model's whose weights are all pickled."""
    return "config.json" in names and any(map(PICKLED.has, names))


def _weights_of(names: Sequence[str], pickled: bool) -> list[str]:
    """One set of weights of one folder."""
    kind = kind_of(names, pickled)
    weights = [name for name in names if kind.has(name)]
    return next((found for stem in kind.stems if (found := [n for n in weights if n.startswith(stem)])), weights)


def side_files(names: Sequence[str]) -> list[str]:
    """Those of a repository's files that are small and no weights, of its top folder only."""
    return [name for name in names if "/" not in name and name.endswith(_SIDE_FILES)]

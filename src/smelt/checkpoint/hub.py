"""Hub repositories: owner/name[@revision], resolved once to a commit in the local cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import InputRejected, OperationFailed, show

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model", "*.md"]


def is_id(text: str) -> bool:
    """Whether ``text`` could be a repository rather than a path."""
    return _ID.fullmatch(text) is not None and not text.startswith((".", "~"))


def offline() -> bool:
    words = {"1", "ON", "YES", "TRUE"}
    return any(os.environ.get(name, "").upper() in words for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def fetch(repository: str, revision: str | None) -> tuple[Path, str]:
    """The local snapshot of a repository, downloaded where allowed, and its commit.

    Raises InputRejected when it does not exist, or is not in the cache while offline.
    """
    import huggingface_hub
    from huggingface_hub import errors

    where = f"{repository}@{revision}" if revision else repository
    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=_PATTERNS, local_files_only=offline()
        )
    except errors.LocalEntryNotFoundError as error:
        hint = "it is not in the local cache and the hub is switched off" if offline() else "the hub cannot be reached"
        raise InputRejected(f"{show(where)}: no such folder, and as a hub id {hint}") from error
    except errors.RevisionNotFoundError as error:
        raise InputRejected(f"{show(where)}: the hub has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise InputRejected(f"{show(where)}: neither a local folder nor a hub repository that you may read") from error
    except errors.HFValidationError as error:
        raise InputRejected(f"{show(where)}: no such folder, and not a hub id") from error
    except OSError as error:
        raise OperationFailed(f"{show(where)}: download failed: {error}") from error
    snapshot = Path(found)
    _refuse_unfinished(snapshot)
    return snapshot, snapshot.name


def _refuse_unfinished(snapshot: Path) -> None:
    """A link in a snapshot whose blob is missing means an interrupted download."""
    for path in sorted(snapshot.iterdir()):
        if path.is_symlink() and not path.exists():
            raise InputRejected(
                f"{show(path.name)} in the cache of {snapshot.parents[1].name} is unfinished: download again"
            )

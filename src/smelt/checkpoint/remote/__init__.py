"""Models at the other end of a URL: hf://owner/name[@revision][/file], https://, s3:// and what else fsspec reaches.

Headers are read first, by one small request for each file; then tensors by ranges, into the stream. Nothing is
downloaded whole, and no name from outside becomes a path here.
"""

from __future__ import annotations

import contextlib
import re
from urllib.parse import unquote

from ...errors import InputRejected, UsageError, show
from .. import hub
from ..documents import MAX_BYTES
from ..place import LocalPlace, Target
from .client import client_for

_HUB = re.compile(r"([^/@]+/[^/@]+)(?:@([^/]+))?(?:/([^/]+))?/?")

#: What is a file of a model, or of something else that must be refused by name.
_FILES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf")


def located(url: str, revision: str | None = None) -> tuple[Target, str | None]:
    """The place that a URL names, the one file in it that is meant if so, and the commit where there are commits."""
    _check_signs(url)
    scheme, rest = url.split("://", 1)
    if scheme == "hf":
        return _in_repository(url, rest, revision)
    if switch := hub.switched_off():
        raise InputRejected(f"{show(url, 1000)}: {switch} is set, which forbids the network")
    if revision is not None:
        raise UsageError(f"{show(url, 1000)} has no revision {show(revision)}: leave it out")
    place, file = _on_server(url) if scheme in ("http", "https") else _in_bucket(url)
    if file is not None and file.endswith(".index.json") and place.small(file, MAX_BYTES) is None:
        raise InputRejected(f"{show(url, 1000)}: no such file, or none that you may read")
    return (place, file), None


def _check_signs(url: str) -> None:
    """A URL must end where it seems to end, wherever it is shown."""
    web = url.startswith("http")
    odd = any(sign in "'\"<>\\#" or (web and (sign == " " or not sign.isascii())) for sign in url)
    if odd or not url.isprintable():
        raise UsageError(f"{show(url, 1000)}: what is no plain letter, digit or sign must be escaped, as %20")


def _in_repository(url: str, rest: str, revision: str | None) -> tuple[Target, str]:
    from .hugging import repository

    match = _HUB.fullmatch(rest)
    if match is None:
        raise UsageError(f"{show(url, 1000)}: expected hf://owner/name, hf://owner/name@revision or one with /file")
    if match[2] and revision:
        raise UsageError(f"{show(url, 1000)} names a revision, and {show(revision)} is another: leave one out")
    if hub.switched_off():
        folder, commit = hub.fetch(match[1], match[2] or revision)
        return (LocalPlace(folder), match[3]), commit
    place = repository(match[1], match[2] or revision)
    if match[3] and match[3] not in place.names():
        raise InputRejected(f"{show(url, 1000)}: the repository has no such file")
    return (place, match[3]), place.commit


def _on_server(url: str) -> Target:
    """A URL that does not end like a file is a folder if weights are in it, and else the address of a file."""
    from .http import HttpPlace

    client, bare = client_for(url)
    path, mark, query = bare.partition("?")
    home, file = _split(path)
    place = HttpPlace(client, home + mark + query)
    if file is not None:
        return place, _plain(file, url)
    parent, _, last = home.rpartition("/")
    above = HttpPlace(client, parent + mark + query)
    with contextlib.suppress(InputRejected):  # a page that lists the folder, as a rule
        if not place.names() and above.answers(_plain(last, url)):
            return above, _plain(last, url)
    return place, None


def _plain(file: str, url: str) -> str:
    name = unquote(file)
    if "/" in name:
        raise UsageError(f"{show(url, 1000)} ends in {show(name)}, which is no plain name of a file")
    return name


def _in_bucket(url: str) -> Target:
    from .buckets import BucketPlace, system_for

    system, path = system_for(url)
    if not path.strip("/"):
        raise UsageError(f"{show(url, 1000)} names no file or folder")
    home, file = _split(path)
    return BucketPlace(system, home, url.rstrip("/").rpartition("/")[0] if file else url), file


def _split(path: str) -> tuple[str, str | None]:
    """A folder, and the name of a file where the path ends in one."""
    home, _, last = path.rstrip("/").rpartition("/")
    return (home, last) if last.endswith(_FILES) else (path.rstrip("/"), None)

"""Files and folders of whatever fsspec reaches: s3, gs, az and others."""

from __future__ import annotations

from typing import Any, NoReturn

from ...errors import InputRejected, MissingExtra, SmeltError, UsageError, show, without_secrets
from ..place import Place
from ..stored import Stored
from .blocks import RemoteFile
from .places import RemotePlace
from .transport import Beginning, Interrupted, NotThere, Transport, failure, patiently

#: Ways of fsspec to name files of this machine, or files inside of other files.
_REFUSED = (
    "file", "local", "http", "data", "reference", "zip", "tar", "cached", "filecache", "simplecache", "blockcache",
)  # fmt: skip

#: What file systems tell versions by, the surest first.
_TELLING = ("ETag", "etag", "generation", "md5", "LastModified", "last_modified", "mtime", "created")


class BucketFile(Transport):
    """One object of a file system of fsspec."""

    def __init__(self, system: Any, path: str, url: str) -> None:
        self.name = without_secrets(url)
        self.key = url
        self._system, self._path = system, path

    def begin(self, count: int) -> Beginning:
        try:
            self._system.invalidate_cache()
            facts = self._system.info(self._path)
            size = int(facts.get("size") or 0)
            head = self._system.cat_file(self._path, start=0, end=min(count, size)) if size else b""
        except Exception as error:
            _translate(self.name, error)
        if facts.get("type") == "directory":
            raise NotThere("a folder, not a file")
        version = next((str(facts[key]) for key in _TELLING if facts.get(key)), "")
        return Beginning(bytes(head), size, version)

    def fill(self, out: memoryview, offset: int) -> int:
        try:
            data = self._system.cat_file(self._path, start=offset, end=offset + len(out))[: len(out)]
        except Exception as error:
            _translate(self.name, error)
        out[: len(data)] = data
        return len(data)


class BucketPlace(RemotePlace):
    """A folder, or the keys that begin alike."""

    def __init__(self, system: Any, path: str, url: str) -> None:
        super().__init__()
        self._system, self._path, self._url = system, path.rstrip("/"), without_secrets(url).rstrip("/")
        self._kinds: dict[str, str] = {}

    def shown(self, name: str | None = None) -> str:
        return show(self._url if name is None else f"{self._url}/{name}", 1000)

    def open(self, name: str) -> Stored:
        return RemoteFile(BucketFile(self._system, f"{self._path}/{name}", f"{self._url}/{name}"), name)

    def names(self) -> list[str]:
        return sorted(self._kinds_of())

    def has_folder(self, name: str) -> bool:
        return self._kinds_of().get(name) == "directory"

    def inside(self, name: str) -> Place:
        return BucketPlace(self._system, f"{self._path}/{name}", f"{self._url}/{name}")

    def _kinds_of(self) -> dict[str, str]:
        """What is in the folder, and whether it is a "file" or a "directory"; asked for once."""
        if not self._kinds:
            try:
                found = patiently(self._listed, self.shown())
            except NotThere as error:
                raise InputRejected(f"{self.shown()}: {error}") from error
            self._kinds = {str(facts["name"]).rstrip("/").rpartition("/")[2]: str(facts["type"]) for facts in found}
        return self._kinds

    def _listed(self) -> list[dict[str, Any]]:
        try:
            self._system.invalidate_cache()
            found: list[dict[str, Any]] = self._system.ls(self._path, detail=True)
        except Exception as error:
            _translate(self._url, error)
        return found

    def whole(self, name: str, limit: int) -> bytes:
        path = f"{self._path}/{name}"
        try:
            size = int(self._system.info(path).get("size") or 0)
            data = self._system.cat_file(path) if size <= limit else b""
        except Exception as error:
            _translate(f"{self._url}/{name}", error)
        if size > limit:
            raise InputRejected(f"{self.shown(name)} has {size} bytes, at most {limit} are accepted")
        return bytes(data)


def _translate(name: str, error: Exception) -> NoReturn:
    """Say what an exception of fsspec, or of a library under it, means for us."""
    if isinstance(error, SmeltError | Interrupted | NotThere):
        raise error
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        raise NotThere("no such file or folder") from error
    if isinstance(error, PermissionError):
        raise NotThere("access refused") from error
    if isinstance(error, OSError):
        raise Interrupted(f"{type(error).__name__}: {without_secrets(str(error))}") from error
    raise failure(name, error) from error


def system_for(url: str) -> tuple[Any, str]:
    """The file system that a URL names, and the path in it."""
    scheme = url.partition("://")[0]
    if "::" in url or scheme in _REFUSED:
        raise UsageError(f"{show(url, 1000)}: {scheme}:// is not read: give a path, https:// or a bucket")
    try:
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations
    except ImportError as error:
        raise MissingExtra(f"{scheme}://", "remote") from error
    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        if scheme in ("s3", "s3a"):
            raise MissingExtra(f"{scheme}://", "remote") from error
        advice = known_implementations.get(scheme, {}).get("err", error)
        raise UsageError(f"{scheme}:// needs an optional dependency, for pip install: {advice}") from error
    except Exception as error:
        raise UsageError(f"{show(url, 1000)}: {error}") from error
    return system, str(path)

"""Repositories of the hub, a file at a time: listed at a commit, read by range, never downloaded whole."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from .. import hub
from .client import Client, client_for
from .http import HttpFile, HttpPlace


def repository(name: str, revision: str | None) -> HubPlace:
    """The top folder of a repository. Raises as :func:`hub.listed`."""
    from huggingface_hub import get_token

    commit, files, url = hub.listed(name, revision)
    token = get_token()
    client, url = client_for(url, None if token is None else f"Bearer {token}")
    return HubPlace(client, url, commit, files)


class HubPlace(HttpPlace):
    """A repository at one commit, which ``commit`` names: what is there can never change."""

    lists = True

    def __init__(self, client: Client, url: str, commit: str, files: Sequence[str]) -> None:
        """``files``: the paths of all files below."""
        super().__init__(client, url)
        self.commit, self._files = commit, files
        self._listed = sorted({path.partition("/")[0] for path in files})

    def transport(self, name: str) -> HttpFile:
        return HttpFile(self._client, self.url(name), self.commit)

    def names(self) -> list[str]:
        return self._listed

    def has(self, name: str) -> bool:
        return name in self._listed

    def beside(self) -> list[str]:
        return hub.side_files(self._files)

    def has_folder(self, name: str) -> bool:
        return any(path.startswith(f"{name}/") for path in self._files)

    def inside(self, name: str) -> HubPlace:
        below = [path.removeprefix(f"{name}/") for path in self._files if path.startswith(f"{name}/")]
        return HubPlace(self._client, f"{self._folder}/{quote(name, safe='')}", self.commit, below)

    def small(self, name: str, limit: int) -> bytes | None:
        return super().small(name, limit) if name in self._listed else None

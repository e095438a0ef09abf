"""Repositories of the hub, a file at a time: listed at a commit, read by range, never downloaded whole."""

from __future__ import annotations

from .. import hub
from .client import client_for
from .http import HttpFile, HttpPlace


class HubPlace(HttpPlace):
    """A repository at one commit, which ``commit`` names: what is there can never change."""

    def __init__(self, repository: str, revision: str | None) -> None:
        from huggingface_hub import get_token

        self.commit, self._listed, url = hub.listed(repository, revision)
        token = get_token()
        client, url = client_for(url, None if token is None else f"Bearer {token}")
        super().__init__(client, url)

    def transport(self, name: str) -> HttpFile:
        return HttpFile(self._client, self.url(name), self.commit)

    def names(self) -> list[str]:
        return self._listed

    def beside(self) -> list[str]:
        return hub.side_files(self._listed)

    def small(self, name: str, limit: int) -> bytes | None:
        return super().small(name, limit) if name in self._listed else None

"""Files of a web server, which must serve ranges, and folders of it, which it cannot list."""

from __future__ import annotations

import re
from typing import NoReturn
from urllib.parse import quote, urlsplit

from ...errors import InputRejected, OperationFailed, show, without_secrets
from ..documents import MAX_BYTES
from ..selection import ADAPTER, PICKLED, PICKLED_ADAPTER, SAFETENSORS
from ..stored import Stored, changed
from .blocks import RemoteFile, pool
from .client import Answer, Client
from .places import RemotePlace
from .transport import Beginning, Interrupted, NotThere, Transport, patiently

_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_EMPTY = re.compile(r"bytes \*/(\d{1,18})")
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_ABSENT = {401, 403, 404, 410}

#: What may lie beside the weights of a folder that cannot be listed, or in one of a pipeline.
BESIDE = (
    "README.md", "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json",
    "config_sentence_transformers.json", "feature_extractor_config.json", "generation_config.json", "merges.txt",
    "model_index.json", "modules.json", "preprocessor_config.json", "processor_config.json", "scheduler_config.json",
    "sentence_bert_config.json", "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json",
    "vocab.txt",
)  # fmt: skip


class HttpFile(Transport):
    """One URL. ``version`` names content that cannot change, such as that of a commit."""

    def __init__(self, client: Client, url: str, version: str = "") -> None:
        self.name = without_secrets(url)
        self.key = f"{url} {version}"
        self._client, self._url, self._pinned = client, url, version
        self._place = url  # where redirects led, until that expires
        self._known: Beginning | None = None

    def begin(self, count: int) -> Beginning:
        self._place = self._url
        with self._client.get(self._url, _range(0, count)) as answer:
            if answer.status == 416 and (match := _EMPTY.fullmatch(answer.headers.get("content-range", ""))):
                return Beginning(b"", int(match[1]), self._version(answer))
            end, size = self._served(answer, 0, count)
            head = memoryview(bytearray(end))
            done = answer.read_into(head)
            if done < end:
                raise Interrupted(f"{done} of {end} bytes came")
            found = Beginning(bytes(head), size, self._version(answer))
            self._known, self._place = self._known or found, answer.url
        return found

    def fill(self, out: memoryview, offset: int) -> int:
        with self._client.get(self._place, _range(offset, len(out))) as answer:
            self._check_expiry(answer)
            end, size = self._served(answer, offset, len(out))
            if self._known is not None and (size, self._version(answer)) != self._known[1:]:
                raise changed(self.name, f"it has {size} bytes now" if size != self._known.size else "it was replaced")
            self._place = answer.url
            return answer.read_into(out[: end - offset])

    def _version(self, answer: Answer) -> str:
        return self._pinned or answer.headers.get("etag") or answer.headers.get("last-modified", "")

    def _check_expiry(self, answer: Answer) -> None:
        """Where redirects led may have expired: then ask at the front door again."""
        if answer.status in _ABSENT and answer.url != self._url:
            self._place = self._url
            raise Interrupted(f"the server answered {answer.status}")

    def _served(self, answer: Answer, offset: int, count: int) -> tuple[int, int]:
        """Where the range ends that the answer holds, and the size of the file."""
        if answer.status != 206:
            _refuse(answer, self.name)
        match = _RANGE.fullmatch(answer.headers.get("content-range", ""))
        first, last, size = map(int, match.groups()) if match else (-1, -1, -1)
        if not (first == offset <= last < min(size, offset + count)) or _is_encoded(answer):
            said = answer.headers.get("content-range", "no range")
            raise OperationFailed(
                f"{show(self.name, 1000)}: asked for {count} bytes from {offset} on, the server answered {show(said)}: "
                "download the file and give its path"
            )
        return last + 1, size


def _range(offset: int, count: int) -> dict[str, str]:
    return {"Range": f"bytes={offset}-{offset + count - 1}"}


def _is_encoded(answer: Answer) -> bool:
    return answer.headers.get("content-encoding", "identity") != "identity"


def _refuse(answer: Answer, name: str) -> NoReturn:
    """Why an answer is not what was asked for."""
    where, status = show(name, 1000), answer.status
    if status in _AGAIN:
        after = answer.headers.get("retry-after", "")
        raise Interrupted(f"the server answered {status}", float(after) if after.isdecimal() else 0)
    if status in (401, 403):
        raise NotThere(f"access refused ({status})")
    if status in _ABSENT:
        raise NotThere(f"no such file ({status})")
    if status == 416:
        raise changed(name, "it is shorter now")
    if status == 200:
        raise InputRejected(f"{where}: the server serves no ranges: download the file and give its path")
    raise OperationFailed(f"{where}: the server answered {status}")


class HttpPlace(RemotePlace):
    """A folder of a web server. ``url`` may have a query, which goes along with every file."""

    lists = False

    def __init__(self, client: Client, url: str) -> None:
        super().__init__()
        parts = urlsplit(url)
        self._client = client
        self._folder = parts._replace(query="", fragment="").geturl().rstrip("/")
        self._query = f"?{parts.query}" if parts.query else ""
        self._weights: list[str] | None = None
        self._inner: dict[str, HttpPlace] = {}

    def shown(self, name: str | None = None) -> str:
        return show(self._folder if name is None else f"{self._folder}/{name}", 1000)

    def url(self, name: str) -> str:
        return f"{self._folder}/{quote(name, safe='')}{self._query}"

    def transport(self, name: str) -> HttpFile:
        return HttpFile(self._client, self.url(name))

    def open(self, name: str) -> Stored:
        return RemoteFile(self.transport(name), name)

    def names(self) -> list[str]:
        """The first set of weights that answers: an index with its files, or a single file."""
        if self._weights is None:
            self._weights = sorted(self._found())
        return self._weights

    def _found(self) -> list[str]:
        for kind, stem in [(one, stem) for one in (SAFETENSORS, PICKLED) for stem in one.stems]:
            index, single = f"{stem}{kind.index}", f"{stem}{kind.endings[0]}"
            if self.small(index, MAX_BYTES) is not None:
                weight_map = self.json(index).get("weight_map")
                files = weight_map.values() if isinstance(weight_map, dict) else ()
                return [index, *{file for file in files if isinstance(file, str)}]
            if self.answers(single):
                return [single]
        return next(([name] for name in (ADAPTER, PICKLED_ADAPTER) if self.answers(name)), [])

    def has(self, name: str) -> bool:
        return self.small(name, MAX_BYTES) is not None if name.endswith(".json") else self.answers(name)

    def has_folder(self, name: str) -> bool:
        """Whether any file that is known by name lies in it."""
        return name not in BESIDE and bool(self.inside(name).beside() or self.inside(name).names())

    def inside(self, name: str) -> HttpPlace:
        if name not in self._inner:
            self._inner[name] = HttpPlace(self._client, f"{self._folder}/{quote(name, safe='')}{self._query}")
        return self._inner[name]

    def answers(self, name: str) -> bool:
        """Whether a file is there. Raises InputRejected when it is not served by ranges."""
        try:
            transport = self.transport(name)
            patiently(lambda: transport.begin(1), transport.name)
        except NotThere:
            return False
        return True

    def beside(self) -> list[str]:
        found = pool().map(lambda name: self.small(name, MAX_BYTES), BESIDE)
        return [name for name, data in zip(BESIDE, found, strict=True) if data is not None]

    def whole(self, name: str, limit: int) -> bytes:
        return _whole(self._client, self.url(name), self.shown(name), limit)


def _whole(client: Client, url: str, where: str, limit: int) -> bytes:
    """A small file, whatever the server says of its length."""
    with client.get(url, {}) as answer:
        if answer.status != 200:
            _refuse(answer, without_secrets(url))
        length = answer.headers.get("content-length", "")
        if _is_encoded(answer):
            raise OperationFailed(f"{where}: the server compresses it unasked: download the file and give its path")
        data = bytearray()
        piece = memoryview(bytearray(1 << 20))
        while got := answer.read_into(piece):
            data += piece[:got]
            if len(data) > limit:
                raise InputRejected(f"{where} has more than {limit} bytes, which is too many")
        if length.isdecimal() and len(data) != int(length):
            raise Interrupted(f"{len(data)} of {length} bytes came")
        return bytes(data)

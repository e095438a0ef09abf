"""Servers on this machine for tests of remote inputs: files with ranges, as much S3 as reading takes, misbehaviour."""

from __future__ import annotations

import hashlib
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

#: May answer a request itself, and then returns True.
Rule = Callable[["Handler", int, int], bool]


class FileServer(ThreadingHTTPServer):
    """Serves ``root``. ``requests`` are (path, first byte, bytes sent) as they were answered."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root: Path, handler: type[Handler] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.root = root
        self.requests: list[tuple[str, int, int]] = []
        self.secrets: list[str | None] = []
        self.rules: list[Rule] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is nothing to tell of."""

    def sent(self, suffix: str = ".safetensors") -> int:
        return sum(count for path, _, count in self.requests if path.endswith(suffix))


class Handler(BaseHTTPRequestHandler):
    """GET of files, with single ranges, ETag and connections that stay open."""

    protocol_version = "HTTP/1.1"
    server: FileServer

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.server.secrets.append(self.headers.get("Authorization"))
        path = self.server.root / unquote(urlsplit(self.path).path).lstrip("/")
        data = path.read_bytes() if path.is_file() else None
        first, last = self.range(len(data or b""))
        if any(rule(self, first, last) for rule in self.server.rules):
            return
        if data is None:
            self.answer(404)
        elif "Range" in self.headers:
            self.serve(data, first, last)
        else:
            self.answer(200, data)

    def do_HEAD(self) -> None:
        path = self.server.root / unquote(urlsplit(self.path).path).lstrip("/")
        if not path.is_file():
            self.answer(404)
            return
        data = path.read_bytes()
        self.send_response(200)
        for name, value in {**self.facts(data), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()

    def range(self, size: int) -> tuple[int, int]:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        return (int(match[1]), min(int(match[2]), size - 1)) if match else (0, size - 1)

    def serve(self, data: bytes, first: int, last: int) -> None:
        if first > last:
            self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        said = {**self.facts(data), "Content-Range": f"bytes {first}-{last}/{len(data)}"}
        self.answer(206, data[first : last + 1], said, first)

    def facts(self, data: bytes) -> dict[str, str]:
        return {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Last-Modified": "Sat, 21 Nov 2026 10:00:00 GMT"}

    def answer(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None, first: int = 0) -> None:
        self.server.requests.append((urlsplit(self.path).path, first, len(data)))
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


class Bucket(Handler):
    """As much of S3 as reading takes: objects by path-style keys, and listings of version 2."""

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        if "list-type" in query:
            self.list(query.get("prefix", [""])[0])
        else:
            super().do_GET()

    def list(self, prefix: str) -> None:
        bucket = self.server.root / urlsplit(self.path).path.strip("/")
        files = sorted(path for path in bucket.rglob("*") if path.is_file())
        keys = {path.relative_to(bucket).as_posix(): path for path in files}
        found = {key: path for key, path in keys.items() if key.startswith(prefix)}
        flat = [key for key in found if "/" not in key[len(prefix) :]]
        deep = sorted({prefix + key[len(prefix) :].partition("/")[0] + "/" for key in found if key not in flat})
        self.answer(200, self.listing(prefix, {key: found[key] for key in flat}, deep).encode())

    def listing(self, prefix: str, found: dict[str, Path], folders: list[str]) -> str:
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-11-21T10:00:00.000Z</LastModified>"
            f"<ETag>{escape(self.facts(path.read_bytes())['ETag'])}</ETag><Size>{path.stat().st_size}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for key, path in found.items()
        )
        prefixes = "".join(f"<CommonPrefixes><Prefix>{escape(key)}</Prefix></CommonPrefixes>" for key in folders)
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Prefix>{escape(prefix)}</Prefix><KeyCount>{len(found) + len(folders)}</KeyCount><MaxKeys>1000</MaxKeys>"
            f"<IsTruncated>false</IsTruncated>{contents}{prefixes}</ListBucketResult>"
        )


@contextmanager
def serving(
    root: Path, handler: type[Handler] | None = None, tls: ssl.SSLContext | None = None
) -> Iterator[FileServer]:
    """A server of the files below ``root``, until the end of the block."""
    server = FileServer(root, handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def times(count: int, rule: Rule) -> Rule:
    """The rule for the first ``count`` requests of weights."""
    left = [count]

    def limited(handler: Handler, first: int, last: int) -> bool:
        if left[0] <= 0 or "Range" not in handler.headers:
            return False
        left[0] -= 1
        return rule(handler, first, last)

    return limited

"""HTTP requests, with care: TLS, redirects that cannot lead into a private network, credentials for one host alone."""

from __future__ import annotations

import http.client
import ipaddress
import ssl
import threading
import weakref
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from ..._version import __version__
from ...errors import InputRejected, show, without_secrets
from .transport import Interrupted

TIMEOUT = 30.0  # seconds without a sign of life
_REDIRECTS = 5
_USER_AGENT = f"smelt/{__version__}"

Origin = tuple[str, str, int]


@dataclass
class Answer:
    """What came back: headers, and a body to be read. ``url`` is where it came from, redirects followed."""

    url: str
    status: int
    headers: Mapping[str, str]
    body: http.client.HTTPResponse

    def read_into(self, out: memoryview) -> int:
        """As many bytes as come before it ends or breaks off. Raises Interrupted when there is none."""
        done = 0
        while done < len(out):
            try:
                got = self.body.readinto(out[done:])
            except (OSError, http.client.HTTPException, ValueError) as error:
                if done:
                    return done
                raise Interrupted(_words(error)) from error
            if not got:
                break
            done += got
        return done


class Client:
    """Requests that carry ``secret`` as their Authorization to one origin, and never to another. Thread-safe."""

    def __init__(self, home: Origin, secret: str | None = None) -> None:
        self._home, self._secret = home, secret
        self._idle: dict[Origin, list[http.client.HTTPConnection]] = defaultdict(list)
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._idle)

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str]) -> Iterator[Answer]:
        """The answer to a GET, redirects followed. Raises Interrupted or InputRejected."""
        for _ in range(_REDIRECTS + 1):
            with self._once(url, headers) as answer:
                target = answer.headers.get("location") if answer.status in (301, 302, 303, 307, 308) else None
                if target is None:
                    yield answer
                    return
            url = _redirected(url, target)
        raise InputRejected(f"{show(url, 1000)}: redirected more than {_REDIRECTS} times")

    @contextmanager
    def _once(self, url: str, headers: Mapping[str, str]) -> Iterator[Answer]:
        parts = urlsplit(url)
        origin = origin_of(parts)
        own = {"Host": parts.netloc, "User-Agent": _USER_AGENT, "Accept-Encoding": "identity"}
        if self._secret is not None and origin == self._home:
            own["Authorization"] = self._secret
        connection, reused = self._connection(origin)
        try:
            response = _sent(connection, url, {**own, **headers})
            yield Answer(url, response.status, {k.lower(): v for k, v in response.getheaders()}, response)
            reusable = response.isclosed() and not response.length and not response.will_close
        except BaseException as error:
            connection.close()
            if reused and isinstance(error, Interrupted):  # it had been closed meanwhile, and so may be the others
                self._forget(origin)
            raise
        self._put_back(origin, connection, reusable)

    def _connection(self, origin: Origin) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            if self._idle[origin]:
                return self._idle[origin].pop(), True
        return _connect(origin), False

    def _forget(self, origin: Origin) -> None:
        with self._lock:
            idle = self._idle.pop(origin, [])
        _close_all({origin: idle})

    def _put_back(self, origin: Origin, connection: http.client.HTTPConnection, reusable: bool) -> None:
        if not reusable:
            connection.close()
            return
        with self._lock:
            self._idle[origin].append(connection)


def _sent(connection: http.client.HTTPConnection, url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    parts = urlsplit(url)
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers=dict(headers))
        return connection.getresponse()
    except ssl.SSLCertVerificationError as error:
        raise InputRejected(f"{show(url, 1000)}: its certificate is not valid: {error.verify_message}") from error
    except (UnicodeError, http.client.InvalidURL) as error:
        raise InputRejected(f"{show(url, 1000)} holds signs that must be escaped, as %20") from error
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(_words(error)) from error


def _close_all(idle: Mapping[Origin, list[http.client.HTTPConnection]]) -> None:
    for connections in idle.values():
        for connection in connections:
            connection.close()


def client_for(url: str, secret: str | None = None) -> tuple[Client, str]:
    """A client for the origin of ``url``, with its user and password, and the URL without them."""
    parts = urlsplit(url)
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    if user:
        secret = "Basic " + b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    return Client(origin_of(bare), secret), bare.geturl()


def origin_of(parts: SplitResult) -> Origin:
    """Scheme, host and port. InputRejected unless it is https, or http on this machine."""
    try:
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise InputRejected(f"{show(parts.geturl(), 1000)}: {error}") from error
    if not host:
        raise InputRejected(f"{show(parts.geturl(), 1000)} names no host")
    if parts.scheme == "https":
        return "https", host, port or 443
    if parts.scheme == "http" and _is_this_machine(host):
        return "http", host, port or 80
    raise InputRejected(f"{show(parts.geturl(), 1000)}: {parts.scheme} can be read and changed on the way: use https")


def _is_this_machine(host: str) -> bool:
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _redirected(url: str, location: str) -> str:
    """Where a redirect leads. InputRejected from https to anything else, and into private networks from outside."""
    target = urljoin(url, location)
    there, here = urlsplit(target), urlsplit(url)
    if there.scheme != "https" and (here.scheme == "https" or there.scheme != "http"):
        raise InputRejected(f"{show(url, 1000)} redirects to {show(without_secrets(target))}: only https is followed")
    host = origin_of(there)[1]
    address = _address(host)
    private = host == "localhost" or (address is not None and not address.is_global)
    if private and host != here.hostname and not _is_this_machine(here.hostname or ""):
        raise InputRejected(f"{show(url, 1000)} redirects to {show(host)}, a private address: refused")
    return there._replace(netloc=there.netloc.rpartition("@")[2], fragment="").geturl()


def _connect(origin: Origin) -> http.client.HTTPConnection:
    from urllib.request import getproxies, proxy_bypass

    scheme, host, port = origin
    if scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    proxy = getproxies().get("https")
    if not proxy or proxy_bypass(host):
        return http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=_tls())
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    connection = http.client.HTTPSConnection(parts.hostname or "", parts.port or 80, timeout=TIMEOUT, context=_tls())
    user = parts.netloc.rpartition("@")[0]
    login = {"Proxy-Authorization": f"Basic {b64encode(unquote(user).encode()).decode()}"} if user else {}
    connection.set_tunnel(host, port, login)
    return connection


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _words(error: BaseException) -> str:
    return (
        f"no answer within {TIMEOUT:.0f} s" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
    )

"""HTTP requests with limits on the whole: on its time, not on one read's, and on the size of what comes back.

A server, or a proxy before it, may be slow, broken or hostile. Every HTTP request of thence goes through `send`: it
ends in time whatever comes, follows no redirect (a key would go elsewhere), uses no proxy, unpacks no more than the
limit, and keeps passwords out of everything that is shown.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import math
import os
import queue
import re
import socket
import ssl
import threading
import time
import urllib.parse
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpcore2

from thence.errors import UserError
from thence.foreign_text import one_line
from thence.redaction import HIDDEN, redacted

LARGEST = 16 * 2**20  # bytes of an answer: a response of 128k tokens, every character escaped, has 2 MB
MOST_HEADERS = 2**17  # httpcore gives up at 100 kB of them, and counts each interim answer anew
LONGEST_PROBLEM = 200  # characters
SHORTEST_SECRET = 4  # a shorter one is a part of many words
_SHOWN_QUERY = ("api-version", "api_version", "version")
_ADDRESS = re.compile(r"https?://[^\s'\"]+")
_VARIABLE = re.compile(r"\$\{(\w+)\}")

Kind = Literal["unreachable", "late", "broken", "large"]


class NoAnswer(Exception):
    """No whole answer came. `kind`: nobody is there, too late, not HTTP or cut, or larger than allowed."""

    def __init__(self, problem: str, kind: Kind):
        super().__init__(problem)
        self.kind: Kind = kind


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said: status, headers (names in lower case, the last of each), and the whole body, unpacked."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body as text, for messages; what is not UTF-8 is replaced."""
        return self.body.decode("utf-8", "replace")

    def value(self) -> Any:
        """The body as JSON. Raises ValueError: no JSON, or one that no program should read (10,000 brackets)."""
        try:
            return json.loads(self.body, parse_constant=lambda name: None)
        except RecursionError:
            raise ValueError("JSON that is nested too deeply") from None


@dataclass(frozen=True, slots=True)
class Address:
    """Where requests go.

    Attributes:
        shown: the address as it may be kept and printed: no user, password or value of the query.
        origin, path, query: of the requests, percent-encoded.
        authorization: header made of the address's user and password; None where it has none.
        secrets: texts that must never be kept or printed.
    """

    shown: str
    origin: tuple[str, str, int]
    path: str
    query: str = field(repr=False)
    authorization: str | None = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)

    def hide(self, text: str, *more: str) -> str:
        """A foreign text in one line without these secrets, `more` of them, or any that can be told by its form."""
        for secret in sorted({*self.secrets, *more}, key=len, reverse=True):
            if len(secret) >= SHORTEST_SECRET:
                text = text.replace(secret, HIDDEN)
        return one_line(redacted(" ".join(text.split())))


def shown_address(text: str) -> str:
    """An address without user, password and the values of its query. The same for one that it has already made."""
    place, mark, query = text.partition("#")[0].partition("?")
    scheme, slashes, rest = place.partition("://")
    _, at, after = rest.rpartition("@")
    place = f"{scheme}{slashes}{HIDDEN}@{after}" if at else place
    items = []
    for item in query.split("&") if mark else ():
        name, equals, value = item.partition("=")
        kept = value if name.lower() in _SHOWN_QUERY else HIDDEN
        items.append(f"{name}={kept}" if equals else HIDDEN)
    return one_line(redacted(place + mark + "&".join(items)))


def shown_addresses(text: str) -> str:
    """A text with every address in it as :func:`shown_address` shows it."""
    return _ADDRESS.sub(lambda match: shown_address(match[0]), text)


def read_address(text: str, *, flag: str, variables: Mapping[str, str] | None = None) -> Address:
    """An address that a user gave.

    Args:
        text: `http://host:port/path?query`, perhaps with `user:password@` before the host. `${NAME}` stands for the
            value of an environment variable, so that a password need not be written down.
        flag: what it was given as, for the error.
        variables: instead of the process's environment.

    Raises:
        UserError: no such address; a variable that is not set.
    """
    variables, values = os.environ if variables is None else variables, []

    def value(match: re.Match[str]) -> str:
        if match[1] not in variables:
            raise UserError(
                f"the address names the environment variable {match[1]}, which is not set",
                remedy=f"export {match[1]}, or write the address without it",
                field=flag,
            )
        values.append(variables[match[1]])
        return urllib.parse.quote(variables[match[1]], safe="")

    full = _VARIABLE.sub(value, text)
    shown = shown_address(text)
    wrong = UserError(f"no address: {shown!r}", remedy=f"write {flag} http://host:port/v1", field=flag)
    if not full.isprintable() or any(character.isspace() for character in full):
        raise wrong
    try:
        parts = urllib.parse.urlsplit(full)
        host = (parts.hostname or "").encode("idna" if not (parts.hostname or "").isascii() else "ascii").decode()
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        raise wrong from None
    if not host or not re.fullmatch(r"[A-Za-z0-9._:%-]+", host):
        raise wrong
    user, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
    code = base64.b64encode(f"{user}:{password}".encode()).decode()
    pairs = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    hidden = [value for name, value in pairs if name.lower() not in _SHOWN_QUERY]
    hidden += [user, password, parts.username or "", parts.password or "", code, *values]
    hidden += [urllib.parse.quote(value, safe="") for value in hidden]
    return Address(
        shown=shown,
        origin=(parts.scheme, host, port),
        path=urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;=~"),
        query=urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~?"),
        authorization=f"Basic {code}" if parts.username is not None else None,
        secrets=tuple(dict.fromkeys(text for text in hidden if text)),
    )


def send(
    method: str,
    address: Address,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    seconds: float,
    largest: int = LARGEST,
) -> Answer:
    """One request on a new connection, and the whole answer to it.

    Args:
        address: its query and credentials are sent; a header Authorization in `headers` does not replace them.
        seconds: for everything: looking up the name, connecting, sending, and reading to the last byte.
        largest: bytes of the answer, as it comes and unpacked.

    Raises:
        NoAnswer: within the limits, no whole answer came.
        ValueError: `seconds` is not a positive, finite number.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"a limit of {seconds} s")
    scheme, host, port = address.origin
    sent = {"Accept-Encoding": "identity", "Connection": "close", **(headers or {})}
    if address.authorization is not None:
        sent["Authorization"] = address.authorization
    sent["Host"] = _host_header(scheme, host, port)
    if body is not None:
        sent["Content-Length"] = str(len(body))
    target = (address.path or "/") + (f"?{address.query}" if address.query else "")
    network = _Network(time.monotonic() + seconds, 2 * largest + MOST_HEADERS)
    url = httpcore2.URL(scheme=scheme.encode(), host=host.encode(), port=port, target=target.encode("ascii"))
    try:
        with (
            httpcore2.ConnectionPool(_trusted() if scheme == "https" else None, network_backend=network) as pool,
            pool.stream(method, url, headers=list(sent.items()), content=body) as answer,
        ):
            found = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in answer.headers}
            return Answer(answer.status, found, _unpacked(_read(answer, found, largest), found, largest))
    except httpcore2.TimeoutException:
        raise NoAnswer(f"no whole answer within {seconds:g} s", "late") from None
    except httpcore2.ConnectError as error:
        raise NoAnswer(one_line(str(error), LONGEST_PROBLEM), "unreachable") from None
    except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
        said = one_line(str(error), LONGEST_PROBLEM)  # it may repeat 100 kB of what came
        raise NoAnswer(f"the answer broke off or is no HTTP: {said}", "broken") from None


def asked_wait(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds that a server asks to be left alone (Retry-After: a number or a date); None: it says nothing usable."""
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,15}(\.[0-9]{0,15})?", text):
        return float(text)
    try:
        then = parsedate_to_datetime(text)
        then = then if then.tzinfo else then.replace(tzinfo=UTC)
        return max(0.0, (then - (now or datetime.now(UTC))).total_seconds())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _read(answer: httpcore2.Response, headers: Mapping[str, str], largest: int) -> bytes:
    told = headers.get("content-length", "")
    if told.isascii() and told.isdecimal() and (len(told) > 15 or int(told) > largest):
        raise NoAnswer(f"an answer of {told[:20]} bytes, at most {largest:,} are read", "large")
    body = bytearray()
    for piece in answer.iter_stream():
        body += piece
        if len(body) > largest:
            raise NoAnswer(f"an answer of more than {largest:,} bytes", "large")
    return bytes(body)


def _unpacked(body: bytes, headers: Mapping[str, str], largest: int) -> bytes:
    """Some proxies pack answers though asked not to."""
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding in ("", "identity"):
        return body
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise NoAnswer(f"an answer packed as {coding[:40]!r}, which was not asked for", "broken")
    unpacker = zlib.decompressobj(wbits=47)  # finds out by itself whether it is gzip or zlib
    try:
        plain = unpacker.decompress(body, largest + 1)
    except zlib.error as error:
        raise NoAnswer(f"an answer packed as {coding} that cannot be unpacked: {error}", "broken") from None
    if len(plain) > largest:
        raise NoAnswer(f"an answer of more than {largest:,} bytes when unpacked", "large")
    if not unpacker.eof:
        raise NoAnswer(f"an answer packed as {coding} that breaks off", "broken")
    return plain


def _host_header(scheme: str, host: str, port: int) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port == {"http": 80, "https": 443}[scheme] else f"{name}:{port}"


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@functools.cache
def _trusted() -> ssl.SSLContext:
    return ssl.create_default_context()


class _Network(httpcore2.NetworkBackend):
    """Opens connections for one request: all waiting ends at its deadline, and so many bytes may come."""

    def __init__(self, deadline: float, most: int):
        self.deadline, self.most = deadline, most

    def left(self, late: type[Exception]) -> float:
        """Seconds until the deadline. Raises `late` after it."""
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise late()
        return seconds

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        problem: OSError = OSError(f"no address of {host}")
        for family, kind, protocol, _, place in self._looked_up(host, port):
            sock = None
            try:
                sock = socket.socket(family, kind, protocol)
                sock.settimeout(self.left(httpcore2.ConnectTimeout))
                sock.connect(place)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return _Stream(sock, self)
            except OSError as error:
                problem = error
                if sock is not None:
                    sock.close()
        if isinstance(problem, TimeoutError):
            raise httpcore2.ConnectTimeout() from problem
        raise httpcore2.ConnectError(_said(problem)) from problem

    def _looked_up(self, host: str, port: int) -> list[Any]:
        """Addresses of a name. The system's look-up knows no time limit, so a thread waits for it."""
        found: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def look() -> None:
            try:
                found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except (OSError, UnicodeError) as error:
                found.put(error)

        threading.Thread(target=look, daemon=True).start()
        try:
            answer = found.get(timeout=self.left(httpcore2.ConnectTimeout))
        except queue.Empty:
            raise httpcore2.ConnectTimeout() from None
        if isinstance(answer, Exception):
            raise httpcore2.ConnectError(_said(answer)) from answer
        return answer


class _Stream(httpcore2.NetworkStream):
    """A connection whose reads and writes end at the request's deadline, whatever each of them brings."""

    def __init__(self, sock: socket.socket, network: _Network):
        self._sock, self._network = sock, network

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            self._sock.settimeout(self._network.left(httpcore2.ReadTimeout))
            piece = self._sock.recv(max_bytes)
        except TimeoutError as error:
            raise httpcore2.ReadTimeout() from error
        except OSError as error:
            raise httpcore2.ReadError(_said(error)) from error
        self._network.most -= len(piece)
        if self._network.most < 0:
            raise NoAnswer("an answer without end: more bytes than any answer has", "large")
        return piece

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        rest = memoryview(buffer)
        try:
            while rest:
                self._sock.settimeout(self._network.left(httpcore2.WriteTimeout))
                rest = rest[self._sock.send(rest) :]
        except TimeoutError as error:
            raise httpcore2.WriteTimeout() from error
        except OSError as error:
            raise httpcore2.WriteError(_said(error)) from error

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        try:
            self._sock.settimeout(self._network.left(httpcore2.ConnectTimeout))
            return _Stream(ssl_context.wrap_socket(self._sock, server_hostname=server_hostname), self._network)
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout() from error
        except (OSError, ValueError) as error:
            self._sock.close()
            raise httpcore2.ConnectError(_said(error)) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.close()

    def get_extra_info(self, info: str) -> Any:
        if info == "ssl_object":
            return self._sock if isinstance(self._sock, ssl.SSLSocket) else None
        return self._sock if info == "socket" else None

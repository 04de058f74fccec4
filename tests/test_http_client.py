"""The HTTP client against servers that are slow, endless, broken or hostile: requests end in time and in memory."""

from __future__ import annotations

import contextlib
import gzip
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from thence.cli import main
from thence.errors import UserError
from thence.http_client import NoAnswer, asked_wait, read_address, send, shown_address

Talk = Callable[[socket.socket], None]


class Raw:
    """A server that reads one request and then does with the connection what it was told, by its method perhaps."""

    def __init__(self) -> None:
        self.talk: Talk = lambda sock: None
        self.talks: dict[bytes, Talk] = {}
        self.request = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                try:
                    self.request = sock.recv(65536)
                    self.talks.get(self.request.partition(b" ")[0], self.talk)(sock)
                except OSError:
                    pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # closing alone leaves the thread listening
        self._listener.close()


@pytest.fixture
def raw() -> Iterator[Raw]:
    server = Raw()
    yield server
    server.close()


def drip(*pieces: bytes, every: float = 0.05) -> Talk:
    """Say something at once, then its last piece again and again, each time within any limit on one read."""

    def talk(sock: socket.socket) -> None:
        for piece in pieces[:-1]:
            sock.sendall(piece)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            sock.sendall(pieces[-1])
            time.sleep(every)

    return talk


def flood(head: bytes, piece: bytes) -> Talk:
    """Say a head and then the same piece without end."""

    def talk(sock: socket.socket) -> None:
        sock.sendall(head)
        while True:
            sock.sendall(piece)

    return talk


def whole(body: bytes, *headers: str, status: str = "200 OK") -> Talk:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return lambda sock: sock.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def get(server: Raw, seconds: float = 5.0, largest: int = 10_000, method: str = "GET", body: bytes | None = None):
    return send(method, read_address(server.url, flag="-e"), seconds=seconds, largest=largest, body=body)


@pytest.mark.parametrize(
    "talk",
    [
        lambda sock: time.sleep(5),
        drip(b"H"),
        drip(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
        drip(b"HTTP/1.1 100 Continue\r\n\r\n"),
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n", b"{"),
        drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n{\r\n"),
        drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"A: b\r\n"),
        drip(b"HTTP/1.1 200 OK\r\n\r\n", b"{"),
    ],
    ids=["silent", "status", "headers", "interim", "body", "chunks", "trailers", "no length"],
)
def test_the_time_limit_is_on_the_whole_request(raw: Raw, talk: Talk) -> None:
    raw.talk = talk
    start = time.monotonic()
    with pytest.raises(NoAnswer, match=r"within 0\.4 s") as caught:
        get(raw, seconds=0.4)
    assert caught.value.kind == "late" and time.monotonic() - start < 2


def test_a_handshake_that_trickles_ends_in_time_too(raw: Raw) -> None:
    raw.talk = drip(b"\x16\x03\x03\x40\x00", b"\x02")
    start = time.monotonic()
    with pytest.raises(NoAnswer, match=r"within 0\.4 s"):
        send("GET", read_address(raw.url.replace("http:", "https:"), flag="-e"), seconds=0.4)
    assert time.monotonic() - start < 2


def test_a_server_that_does_not_read_ends_in_time_too(raw: Raw) -> None:
    raw.talk = lambda sock: time.sleep(5)
    start = time.monotonic()
    with pytest.raises(NoAnswer, match="within"):
        get(raw, seconds=0.4, method="POST", body=b"x" * 50_000_000)
    assert time.monotonic() - start < 3


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "talk",
    [
        flood(OK + b"\r\n", b"x" * 65536),
        flood(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"ffff\r\n" + b"x" * 65535 + b"\r\n"),
        flood(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1;" + b"e" * 2000 + b"\r\nx\r\n"),
        whole(b"", "Content-Encoding: gzip", status="200 OK\r\nContent-Length: 4294967296\r\nX: y"),
        whole(gzip.compress(b"x" * 100_000), "Content-Encoding: gzip"),
        whole(zlib.compress(b"x" * 100_000), "Content-Encoding: deflate"),
        flood(b"", b"HTTP/1.1 102 Processing\r\n\r\n" * 1000),
    ],
    ids=["no length", "chunks", "chunk extensions", "4 GB told", "gzip", "deflate", "interim"],
)
def test_no_more_is_read_or_unpacked_than_allowed(raw: Raw, talk: Talk) -> None:
    raw.talk = talk
    start = time.monotonic()
    with pytest.raises(NoAnswer) as caught:
        get(raw, seconds=20)
    assert caught.value.kind in ("large", "broken") and time.monotonic() - start < 5


@pytest.mark.parametrize(
    "talk",
    [
        lambda sock: None,
        lambda sock: sock.sendall(b"SSH-2.0-OpenSSH_9.6\r\n"),
        lambda sock: sock.sendall(b"\x15\x03\x01\x00\x02\x02\x46"),
        lambda sock: sock.sendall(b"HTTP/1.1 two hundred OK\r\n\r\n"),
        lambda sock: sock.sendall(b"HTTP/1.1 200 OK\r\nno header\r\n\r\n{}"),
        lambda sock: sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}"),
        lambda sock: sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{"),
        lambda sock: sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"),
        lambda sock: sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"),
        flood(OK, b"X-Flood: " + b"y" * 50_000 + b"\r\n"),
        whole(b"\xff\xfe", "Content-Encoding: gzip"),
        whole(gzip.compress(b"hello" * 99)[:-9], "Content-Encoding: gzip"),
        whole(b"??", "Content-Encoding: br"),
    ],
    ids=[
        *("closed", "ssh", "tls alert", "status", "header", "length", "cut", "chunk", "cut chunk", "header flood"),
        *("no gzip", "cut gzip", "brotli"),
    ],
)
def test_what_is_no_whole_answer_is_said_and_nothing_else_is_raised(raw: Raw, talk: Talk) -> None:
    raw.talk = talk
    with pytest.raises(NoAnswer) as caught:
        get(raw)
    assert caught.value.kind in ("broken", "large") and 0 < len(str(caught.value)) < 400


def test_answers_come_in_every_form_that_http_has(raw: Raw) -> None:
    forms = [
        whole(b'{"a": 1}', "X-Name: 1"),
        whole(gzip.compress(b'{"a": 1}'), "Content-Encoding: gzip"),
        whole(zlib.compress(b'{"a": 1}'), "Content-Encoding: deflate"),
        lambda sock: sock.sendall(b'HTTP/1.0 200 OK\r\n\r\n{"a": 1}'),
        lambda sock: sock.sendall(
            b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{"a\r\n5\r\n": 1}\r\n0\r\n\r\n'
        ),
        lambda sock: sock.sendall(b'HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"a": 1}'),
    ]
    for talk in forms:
        raw.talk = talk
        answer = get(raw)
        assert (answer.status, answer.value()) == (200, {"a": 1})
    raw.talk = whole(b"gone", "Location: http://elsewhere/", status="302 Found")
    assert (get(raw).status, get(raw).headers["location"]) == (302, "http://elsewhere/")  # and nobody went there


def test_nobody_there_is_told_apart() -> None:
    for url in ("http://127.0.0.1:9/v1", "http://no-such-host.invalid/v1"):
        with pytest.raises(NoAnswer) as caught:
            send("GET", read_address(url, flag="-e"), seconds=5)
        assert caught.value.kind in ("unreachable", "late")


def test_a_server_without_tls_on_an_https_address_is_said(raw: Raw) -> None:
    raw.talk = whole(b"{}")
    address = read_address(raw.url.replace("http:", "https:"), flag="-e")
    with pytest.raises(NoAnswer, match="SSL") as caught:
        send("GET", address, seconds=5)
    assert caught.value.kind == "unreachable"


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"\xff\xfe\x00", b"", b"<html>"])
def test_json_that_nobody_can_read_is_one_kind_of_error(raw: Raw, body: bytes) -> None:
    raw.talk = whole(body)
    with pytest.raises(ValueError):
        get(raw, largest=10**6).value()


NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        (" 7 ", 7.0),
        ("Thu, 01 Jan 2026 00:00:30 GMT", 30.0),
        ("Wed, 31 Dec 2025 00:00:00 GMT", 0.0),
        ("Thu, 01 Jan 2026 00:00:30", 30.0),
        ("999999999999999", 999999999999999.0),
        *((text, None) for text in ("NaN", "nan", "inf", "1e400", "-1", "-inf", "", "soon", "1_0", "٣", "9" * 400)),
        *((text, None) for text in ("Thu, 99 Jan 99999 00:00:30 GMT", "0x10", "Mon, 32 Foo 2026 25:61:61 GMT")),
    ],
)
def test_a_wait_that_a_server_asks_for_is_a_number_of_seconds_or_nothing(text: str, seconds: float | None) -> None:
    assert asked_wait({"retry-after": text}, NOW) == seconds
    assert asked_wait({}) is None


def test_an_address_gives_its_credentials_to_the_request_alone(raw: Raw) -> None:
    raw.talk = whole(b"{}")
    text = f"http://me:p%40ss-w0rd@127.0.0.1:{raw.port}/v1?api_key=q-u-e-r-y&api-version=2024"
    address = read_address(text, flag="-e")
    send("GET", address, seconds=5, headers={"Authorization": "Bearer other"})
    first, *rest = raw.request.decode().split("\r\n")
    assert first == "GET /v1?api_key=q-u-e-r-y&api-version=2024 HTTP/1.1"
    assert [line for line in rest if line.startswith("Authorization")] == ["Authorization: Basic bWU6cEBzcy13MHJk"]
    assert address.shown == f"http://[hidden]@127.0.0.1:{raw.port}/v1?api_key=[hidden]&api-version=2024"
    for seen in (repr(address), address.hide(f"{text} p@ss-w0rd bWU6cEBzcy13MHJk q-u-e-r-y\n\x1b[2J")):
        assert not any(secret in seen for secret in ("p@ss", "p%40ss", "q-u-e-r-y", "bWU6", "\x1b", "\n"))


def test_an_environment_variable_can_stand_for_a_password() -> None:
    variables = {"PASSWORD": "a/b@c?", "HOST": "example.org"}
    address = read_address("http://me:${PASSWORD}@${HOST}:8000/v1", flag="-e", variables=variables)
    assert address.origin == ("http", "example.org", 8000) and address.authorization == "Basic bWU6YS9iQGM/"
    assert address.shown == "http://[hidden]@${HOST}:8000/v1" and "a/b@c?" in address.secrets
    with pytest.raises(UserError, match="PASSWORD, which is not set"):
        read_address("http://me:${PASSWORD}@host", flag="-e", variables={})


@pytest.mark.parametrize(
    "text",
    [
        *("", "localhost:8000", "ftp://host/", "http://", "http://:80/", "http://host:port/", "http://host:99999/"),
        *(
            "http://[::1",
            "http://ho st/",
            "http://host/\nX: y",
            "http://host/\x00",
            "http://ho\ud800st/",
            "http://a..b\u00df/",
        ),
        *("http://me:sec/ret@host/", "http://me:sec#ret@host/", "http://h<>st/"),
    ],
)
def test_what_is_no_address_is_refused_without_repeating_a_password(text: str) -> None:
    with pytest.raises(UserError) as caught:
        read_address(text, flag="--endpoint")
    assert "--endpoint" in str(caught.value) and "ret@" not in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8000/v1",
        "http://me:pass@word@host/v1",
        "http://me:12/34@host/v1",
        "https://host/v1?code=abc&x&api-version=1#top",
    ],
)
def test_a_shown_address_is_shown_again_as_it_is(text: str) -> None:
    shown = shown_address(text)
    assert shown_address(shown) == shown
    assert not any(secret in shown for secret in ("pass", "word", "12", "34", "abc", "me:"))
    assert shown.endswith(("host:8000/v1", "@host/v1", "?code=[hidden]&[hidden]&api-version=1"))


LISTED = whole(b'{"data": [{"id": "tiny"}]}')
HOSTILE: dict[str, Talk] = {
    "a byte now and then": drip(OK + b"Content-Length: 9000\r\n\r\n", b"{"),
    "headers without end": flood(OK, b"X-Flood: " + b"y" * 50_000 + b"\r\n"),
    "a body without end": flood(OK + b"\r\n", b"x" * 65536),
    "a bomb": whole(gzip.compress(b" " * 50_000_000, 1), "Content-Encoding: gzip"),
    "brackets": whole(b"[" * 1_000_000),
    "objects": whole(b'{"choices":' * 100_000),
    "no text": whole(bytes(range(256))),
    "a web page": whole(b"<html><title>\x1b[2JLog in</title></html>", "Content-Type: text/html"),
    "an error page": whole(b"<html>\x1b[2J</html>", status="502 Bad Gateway"),
    "an error of brackets": whole(b'{"error":' * 50_000, status="400 Bad Request"),
    "no HTTP": lambda sock: sock.sendall(b"220 mail.example ESMTP\r\n"),
    "a date far away": whole(b"", "Retry-After: Fri, 31 Dec 9999 23:59:59 GMT", status="429 Too Many Requests"),
    "a long name": whole(b'{"data": [{"id": "' + b"n" * 1_000_000 + b'"}]}'),
    "strange names": whole(b'{"data": [{"id": "\\u001b[2J\\ud800"}, {"id": null}, {"id": [[]]}]}'),
    "hang up": lambda sock: None,
}


@pytest.mark.parametrize("where", [b"GET", b"POST"], ids=["models", "completions"])
@pytest.mark.parametrize("name", HOSTILE)
def test_an_evaluation_of_a_hostile_server_ends_in_words(
    raw: Raw,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    where: bytes,
) -> None:
    monkeypatch.setattr("thence.evaluate.endpoint.LONGEST_WAIT", 0.01)
    data = tmp_path / "sums.jsonl"
    data.write_text('{"question": "2+2=?", "answer": "4"}\n')
    raw.talks = {b"GET": LISTED, where: HOSTILE[name]}
    start = time.monotonic()
    arguments = ["--endpoint", raw.url, "--suite", str(data), "--folder", str(tmp_path / "e"), "--timeout", "0.5"]
    code = main(["eval", *arguments, "--concurrency", "1"])
    out, err = capsys.readouterr()
    assert code == 2 and "remedy: " in err and time.monotonic() - start < 8
    assert not any(bad in out + err for bad in ("Traceback", "\x1b", "n" * 1000))
    (out + err).encode()

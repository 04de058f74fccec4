"""A server for a browser on this machine: it reads, and answers nobody else.

It listens on the loopback address. A page of another site that has been pointed at this address by its name server
(DNS rebinding) sends its own name as the host, and is refused. Requests name pages by number, never by path.
"""

from __future__ import annotations

import html
import logging
import re
import string
from collections.abc import Callable
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources

from thence.errors import UserError, first_line
from thence.files import to_json
from thence.foreign_text import visible
from thence.pages.served.shelf import Shelf
from thence.redaction import redacted

log = logging.getLogger(__name__)
ADDRESS = "127.0.0.1"
_HOSTS = ("127.0.0.1", "localhost")
_FRAME = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; frame-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_PAGE = "frame-ancestors 'self'; base-uri 'none'"
"""A page brings the rest of its policy itself."""
_HTML, _SCRIPT, _JSON = "text/html; charset=utf-8", "text/javascript; charset=utf-8", "application/json"


class PageServer(ThreadingHTTPServer):
    """Serves the pages of a shelf on the loopback address.

    Args:
        shelf: what is served.
        port: 0 takes a free one.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, shelf: Shelf, port: int):
        self.shelf = shelf
        super().__init__((ADDRESS, port), _Handler)

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return f"http://{ADDRESS}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "thence", ""

    @property
    def _pages(self) -> PageServer:
        assert isinstance(self.server, PageServer)
        return self.server

    def do_GET(self) -> None:
        if not self._is_from_here():
            self._send(HTTPStatus.FORBIDDEN, "text/plain; charset=utf-8", "this server answers its own machine only\n")
            return
        try:
            self._answer()
        except UserError as error:
            self._send(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", f"{redacted(str(error))}\n")
        except BrokenPipeError:
            pass
        except Exception as error:  # half-written files: the next look finds them whole
            log.exception("a page could not be made")
            said = f"this page cannot be made now: {first_line(error)}\n"
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", redacted(said))

    do_HEAD = do_GET

    def _is_from_here(self) -> bool:
        hosts = self.headers.get_all("Host") or []
        origin = self.headers.get("Origin")
        named = {f"{host}:{self._pages.server_port}" for host in _HOSTS}
        return len(hosts) == 1 and hosts[0] in named and origin in (None, *(f"http://{name}" for name in named))

    def _answer(self) -> None:
        shelf, path = self._pages.shelf, self.path.partition("?")[0]
        if path == "/":
            self._send(HTTPStatus.OK, _HTML, _index(shelf), _FRAME)
        elif path == "/shell.js":
            self._send(HTTPStatus.OK, _SCRIPT, _file("shell.js"))
        elif (found := re.fullmatch(r"/(show|page|state)/([0-9]{1,6})", path)) and int(found[2]) < len(shelf.folders):
            _WAYS[found[1]](self, shelf, int(found[2]))
        else:
            raise UserError("nothing is served here", remedy=f"begin at {self._pages.url}")

    def _show(self, shelf: Shelf, place: int) -> None:
        facts = {"title": str(shelf.folders[place]), "state": shelf.said(place), "place": str(place)}
        text = string.Template(_file("shell.html")).substitute({key: _escaped(value) for key, value in facts.items()})
        self._send(HTTPStatus.OK, _HTML, text, _FRAME)

    def _page(self, shelf: Shelf, place: int) -> None:
        self._send(HTTPStatus.OK, _HTML, shelf.page(place), _PAGE)

    def _state(self, shelf: Shelf, place: int) -> None:
        self._send(HTTPStatus.OK, _JSON, to_json({"stamp": shelf.stamp(place), "said": shelf.said(place)}))

    def _send(self, status: HTTPStatus, kind: str, text: str, policy: str = "default-src 'none'") -> None:
        body = text.encode("utf-8", errors="replace")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", policy)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not printed: the terminal shows the address alone."""


_WAYS: dict[str, Callable[[_Handler, Shelf, int], None]] = {
    "show": _Handler._show,
    "page": _Handler._page,
    "state": _Handler._state,
}


def _index(shelf: Shelf) -> str:
    rows = "\n".join(
        f'<li><a href="/show/{place}">{_escaped(str(folder))}</a><small>{_escaped(shelf.said(place))}</small></li>'
        for place, folder in enumerate(shelf.folders)
    )
    return string.Template(_file("index.html")).substitute(rows=rows)


def _escaped(text: str) -> str:
    return html.escape(visible(redacted(text)))


@cache
def _file(name: str) -> str:
    return (resources.files("thence.pages.served") / name).read_text(encoding="utf-8")

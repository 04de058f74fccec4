"""A server of chat completions that answers as a test says, and what asks it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from thence.evaluate.backends import Request
from thence.evaluate.endpoint import EndpointBackend, EndpointSettings
from thence.evaluate.problems import Problem
from thence.evaluate.suites import Task

Answer = tuple[int, dict[str, str], str]


class Server:
    """An OpenAI-compatible server on loopback. `answer(count, path, body)` decides what the count-th request gets."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.models: list[str] = ["tiny"]
        self.answer: Callable[[int, str, dict[str, Any]], Answer | None] = lambda n, path, body: said("4")
        self.lock = threading.Lock()
        self.busy = self.most_busy = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                listed = {"data": [{"id": name} for name in outer.models]}
                self.reply((200, {}, json.dumps(listed)))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.seen.append((self.path, body, dict(self.headers)))
                    count = len(outer.seen)
                    outer.busy += 1
                    outer.most_busy = max(outer.most_busy, outer.busy)
                try:
                    try:
                        found = outer.answer(count, self.path, body)
                    finally:  # before the last byte is out: the client may ask again as soon as it has it
                        with outer.lock:
                            outer.busy -= 1
                    if found is None:  # dies in the middle of its answer
                        self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{"choices": [')
                        return
                    self.reply(found)
                except BrokenPipeError:
                    pass

            def reply(self, answer: Answer) -> None:
                status, headers, text = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


def said(text: str, finish: str = "stop", tokens: int | None = 5, **message: Any) -> Answer:
    usage = {} if tokens is None else {"usage": {"completion_tokens": tokens}}
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return 200, {}, json.dumps({"choices": [choice], **usage})


def failed(status: int, message: str = "no", **headers: str) -> Answer:
    return status, headers, json.dumps({"error": {"message": message}})


TASK = Task(name="sums", files=("sums.jsonl",), temperature=0.5, top_p=0.9, max_tokens=64)


def requests_of(count: int, plain: bool = False) -> list[Request]:
    problem = Problem("sums", "0" * 16, (("system", "s"), ("user", "2+2=?")), "2+2=?", "4", plain=plain)
    return [Request(replace(problem, key=f"{i:016x}"), 0, 2**62 + i) for i in range(count)]


def backend_for(server: Server, **settings: Any) -> EndpointBackend:
    return EndpointBackend(EndpointSettings(server.url, **{"pause": 0.01, "seconds": 5.0, "tries": 3, **settings}))

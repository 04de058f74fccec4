"""Evaluations of a server, for the tests of what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.evaluate.answering_server import Answer, Server, said
from thence.cli import main
from thence.evaluate.store import Store
from thence.evaluate.summary import summarise

Behave = Callable[[int, str, dict[str, Any]], Answer | None]


class Evaluation:
    """`thence eval` of `problems` sums on the test's server. `refuse(i)` is what the i-th problem gets, or None."""

    def __init__(self, server: Server, folder: Path, problems: int = 8):
        self.server, self.folder = server, folder / "e"
        self.data = folder / "sums.jsonl"
        rows = [{"question": f"{i:04d}+{i}=?", "answer": str(2 * i)} for i in range(problems)]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, refuse: Callable[[int], Answer | None] = lambda i: None, *flags: str, url: str = "") -> int:
        def answer(count: int, path: str, body: dict[str, Any]) -> Answer | None:
            i = asked(body)
            return refuse(i) or said(f"#{2 * i}")

        self.server.answer = answer
        return self.again(*flags, url=url)

    def again(self, *flags: str, url: str = "") -> int:
        arguments = ["--suite", str(self.data), "--grader", "exact", "--folder", str(self.folder), *flags]
        concurrency = [] if "--concurrency" in flags else ["--concurrency", "1"]
        return main(["eval", "--endpoint", url or f"{self.server.url}/v1", *arguments, *concurrency])

    @property
    def row(self) -> Any:
        return summarise(Store(self.folder)).tasks[0]


def asked(body: dict[str, Any]) -> int:
    return int(body["messages"][-1]["content"].partition("+")[0])


TOO_LONG = "This model's maximum context length is 64 tokens. However, your messages have 99."


def short(value: Any) -> str:
    return str(value)[:40]

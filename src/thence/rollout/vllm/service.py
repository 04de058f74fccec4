"""What vLLM's process does for its clients: rows of all of them are sampled side by side, first come, first served.

Clients are the ranks of one run. It needs the standard library only: thence is not installed there.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from client import Client, Inbox  # pyright: ignore[reportMissingImports]

QUEUED = 2  # rows held by vLLM for every one that it samples in parallel
ALIVE_SECONDS = 1.0


class Model(Protocol):
    """A model that samples, as this process has it."""

    stamp: list[Any]
    max_rows: int

    def facts(self) -> dict[str, Any]: ...

    def load(self, request: dict[str, Any]) -> dict[str, Any]: ...

    def take(self, request: dict[str, Any]) -> dict[str, Any]: ...

    def add(self, name: str, request: dict[str, Any], row: list[int]) -> None: ...

    def step(self) -> list[Any]: ...

    def abort(self, names: list[str]) -> None: ...


@dataclass
class Asked:
    """A request for responses that is being answered.

    Attributes:
        waiting: rows that the model has not been given, with their numbers.
        held: rows that it has, by their names there, with their numbers.
        steps: rows' steps so far.
        told: when the client last heard that it is alive.
    """

    client: Client
    request: dict[str, Any]
    waiting: deque[tuple[int, list[int]]]
    held: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    told: float = field(default_factory=time.monotonic)

    def name(self, number: int) -> str:
        return f"{self.client.number}-{self.request['id']}-{number}"

    @property
    def stopped(self) -> bool:
        return self.client.gone or self.client.cancelled == self.request["id"]


class Service:
    """A model and who asks it for responses.

    Args:
        inbox: of all clients.
    """

    def __init__(self, model: Model, inbox: Inbox):
        self.model, self.inbox = model, inbox
        self.asked: list[Asked] = []

    def run(self, first: Client | None = None) -> None:
        """Answer until ``first`` has gone, or for ever."""
        while first is None or not first.gone:
            for client, message in self._messages():
                self._hear(client, message)
            if self.asked:
                self._sample()

    def _messages(self) -> list[tuple[Client, dict[str, Any] | None]]:
        """What has come in. Waits for something where there is nothing to sample."""
        found = [] if self.asked else [self.inbox.get()]
        while True:
            try:
                found.append(self.inbox.get_nowait())
            except queue.Empty:
                return found

    def _hear(self, client: Client, message: dict[str, Any] | None) -> None:
        if message is None or message.get("op") == "stop":
            client.gone = True
            self._drop(client)
        if client.gone or message is None:
            return
        try:
            self._answer(client, message)
        except Exception as error:
            client.fail(error)

    def _answer(self, client: Client, message: dict[str, Any]) -> None:
        if message["op"] == "hello":
            client.tell({"ready": self.model.facts()})
        elif message["op"] in ("load", "take"):
            if self.asked:
                raise RuntimeError("weights came while responses were sampled with others")
            client.tell(self.model.load(message) if message["op"] == "load" else self.model.take(message))
        elif message["op"] == "generate":
            self.asked.append(Asked(client, message, deque(enumerate(message["rows"]))))
        else:
            raise ValueError(f"unknown request {message['op']!r}")

    def _sample(self) -> None:
        """One step of all rows that the model holds, and what follows from it. Whatever fails, all clients hear it."""
        try:
            self._fill()
            owners = {name: asked for asked in self.asked for name in asked.held}
            for output in self.model.step() if owners else []:
                asked = owners.get(output.request_id)
                if asked is None:
                    continue
                asked.steps += 1
                if output.finished:
                    number = asked.held.pop(output.request_id)
                    asked.client.tell({"done": number, "stamp": self.model.stamp, **as_plain(output.outputs[0])})
            self._end()
        except Exception as error:
            for client in {id(asked.client): asked.client for asked in self.asked}.values():
                client.fail(error)
                self._drop(client)

    def _fill(self) -> None:
        for asked in self.asked:
            while asked.waiting and not asked.stopped and self._held() < QUEUED * self.model.max_rows:
                number, row = asked.waiting.popleft()
                asked.held[asked.name(number)] = number
                self.model.add(asked.name(number), asked.request, row)

    def _held(self) -> int:
        return sum(len(asked.held) for asked in self.asked)

    def _end(self) -> None:
        """Tell clients that all is done, or that it goes on."""
        for asked in list(self.asked):
            if asked.stopped and asked.held:
                self.model.abort(list(asked.held))
                asked.held.clear()
            if asked.stopped or not (asked.held or asked.waiting):
                self.asked.remove(asked)
                asked.client.tell({"end": asked.request["id"], "stamp": self.model.stamp})
            elif time.monotonic() - asked.told > ALIVE_SECONDS:
                asked.told = time.monotonic()
                asked.client.tell({"alive": asked.steps})

    def _drop(self, client: Client) -> None:
        """Stop what a client that is gone has asked for."""
        for asked in [asked for asked in self.asked if asked.client is client]:
            self.asked.remove(asked)
            if asked.held:
                self.model.abort(list(asked.held))


def as_plain(output: Any) -> dict[str, Any]:
    """A row's output as it is sent."""
    token_ids = list(output.token_ids)
    logps = output.logprobs or ()
    return {
        "token_ids": token_ids,
        "logps": [place[token].logprob for token, place in zip(token_ids, logps, strict=False)],
        "finish": output.finish_reason,
    }

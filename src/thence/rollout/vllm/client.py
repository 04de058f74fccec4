"""A client as vLLM's process sees it. It needs the standard library only: thence is not installed there."""

from __future__ import annotations

import contextlib
import importlib.util
import queue
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

POLL_SECONDS = 1.0
SEND_SECONDS = 1800.0  # a client that reads nothing for so long is dropped
FAREWELL_SECONDS = 5.0

# It lies two folders up. That folder is not put into the path, where the other modules in it would be found.
_SPEC = importlib.util.spec_from_file_location("thence_framed", Path(__file__).resolve().parents[2] / "framed.py")
assert _SPEC is not None and _SPEC.loader is not None
framed = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(framed)

Inbox = queue.Queue[tuple["Client", dict[str, Any] | None]]
"""Clients with what each asks for, in the order in which it came; None: the client is gone."""


class Client:
    """The other side of a conversation: what it asks for is read by one thread, what it is told is sent by another.

    So a client that does not read keeps nobody else waiting.

    Args:
        inbox: where its requests go.
        number: tells its rows from those of other clients.
    """

    def __init__(self, wire: Any, inbox: Inbox, number: int = 0):
        self.wire, self.inbox, self.number = wire, inbox, number
        self.cancelled: Any = None
        self.gone = False
        self._outbox: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._sender = threading.Thread(target=self._send, daemon=True)
        self._sender.start()

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message, after those before."""
        self._outbox.put(message)

    def fail(self, error: BaseException) -> None:
        """Write the traceback to the log, tell the client, who may be gone, and end the conversation."""
        traceback.print_exception(error)
        self._outbox.put(failure_of(error))
        self._outbox.put(None)
        self._sender.join(FAREWELL_SECONDS)
        self.gone = True

    def read(self, alive: Callable[[], bool]) -> None:
        """Read until the conversation ends or `alive` says no."""
        while alive():
            try:
                message = self.wire.receive(POLL_SECONDS)
            except TimeoutError:
                continue
            except (OSError, ValueError):
                break
            if message is None:
                break
            if message.get("op") == "cancel":
                self.cancelled = message.get("id")
            else:
                self.inbox.put((self, message))
        self.gone = True
        self._outbox.put(None)
        self.inbox.put((self, None))

    def _send(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self.wire.send(message, SEND_SECONDS)
        except (OSError, ValueError):
            self.gone = True


def failure_of(error: BaseException) -> dict[str, Any]:
    """What a client is told of an error."""
    return {"failed": f"{type(error).__name__}: {error}"[:100_000]}


def tell_failure(wire: Any, error: BaseException) -> None:
    """As :meth:`Client.fail`, of somebody who has not become a client."""
    traceback.print_exception(error)
    with contextlib.suppress(OSError):
        wire.send(failure_of(error), FAREWELL_SECONDS)

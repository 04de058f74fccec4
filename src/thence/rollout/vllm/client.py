"""A client as vLLM's process sees it. It needs the standard library only: thence is not installed there."""

from __future__ import annotations

import contextlib
import importlib.util
import queue
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
    """The other side of a conversation: what it asks for, read by a separate thread.

    Args:
        inbox: where its requests go.
        number: tells its rows from those of other clients.
    """

    def __init__(self, wire: Any, inbox: Inbox, number: int = 0):
        self.wire, self.inbox, self.number = wire, inbox, number
        self.cancelled: Any = None
        self.gone = False

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message. Raises OSError where the client is gone or does not read."""
        self.wire.send(message, SEND_SECONDS)

    def fail(self, error: BaseException) -> None:
        """Tell it what failed, and end the conversation."""
        tell_failure(self.wire, error)
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
        self.inbox.put((self, None))


def tell_failure(wire: Any, error: BaseException) -> None:
    """Write the traceback to the log, and tell the client, who may be gone."""
    traceback.print_exception(error)
    with contextlib.suppress(OSError):
        wire.send({"failed": f"{type(error).__name__}: {error}"[:100_000]}, FAREWELL_SECONDS)

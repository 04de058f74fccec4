"""Messages between processes, over a pipe or a socket: four bytes of length (big-endian), then JSON in ASCII.

JSON rather than pickle, so that nothing that comes in is ever executed; ASCII, so that lone surrogates in a model's
output survive. Processes in other environments load this file where thence is not installed, so it needs the standard
library only.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import time
from typing import Any, BinaryIO

LARGEST = 1 << 30  # bytes of a message; a longer one is something else than a message
_LENGTH = struct.Struct(">I")


def pack(message: dict[str, Any]) -> bytes:
    """A message as it is sent. Raises ValueError where it is longer than a message may be."""
    body = json.dumps(message).encode("ascii")
    if len(body) > LARGEST:
        raise ValueError(f"a message of {len(body):,} bytes, at most {LARGEST:,} can be sent")
    return _LENGTH.pack(len(body)) + body


def read(pipe: BinaryIO) -> dict[str, Any] | None:
    """The next message of a blocking pipe; None at its end, also in the middle of a message."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    body = pipe.read(length)
    return json.loads(body) if len(body) == length else None


class Inbox:
    """Puts messages together from the pieces that arrive."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, piece: bytes) -> list[dict[str, Any]]:
        """Add a piece; returns the messages that it completes, oldest first. Raises ValueError as :meth:`next`."""
        self.add(piece)
        messages = []
        while (message := self.next()) is not None:
            messages.append(message)
        return messages

    def add(self, piece: bytes) -> None:
        """Add a piece."""
        self._bytes += piece

    def next(self, largest: int = LARGEST) -> dict[str, Any] | None:
        """The oldest whole message; None where none is whole.

        Raises:
            ValueError: what came is no message, or is longer than ``largest`` bytes.
        """
        if len(self._bytes) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._bytes)
        if length > largest:
            raise ValueError(f"a message of {length} bytes")
        end = _LENGTH.size + length
        if len(self._bytes) < end:
            return None
        try:
            message = json.loads(self._bytes[_LENGTH.size : end])
        except RecursionError:
            raise ValueError("a message that is nested too deeply") from None
        del self._bytes[:end]
        if not isinstance(message, dict):
            raise ValueError(f"a message that is no table: {str(message)[:40]}")
        return message


class Wire:
    """Messages over a socket. One thread may send while another receives."""

    def __init__(self, sock: socket.socket):
        self._sock, self._inbox = sock, Inbox()

    def send(self, message: dict[str, Any], seconds: float | None = None) -> None:
        """Send a message.

        Raises:
            OSError: the connection broke (TimeoutError where the other side takes longer to read it).
            ValueError: it is longer than a message may be.
        """
        packed = pack(message)
        self._sock.settimeout(seconds)
        self._sock.sendall(packed)

    def receive(self, seconds: float, largest: int = LARGEST) -> dict[str, Any] | None:
        """The next message; None at the end of the conversation.

        Raises:
            TimeoutError: no whole one came in time, however it trickles; what has come of it is kept.
            ValueError: what came is no message.
            OSError: the connection broke.
        """
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while (message := self._inbox.next(largest)) is None:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            piece = self._sock.recv(1 << 20)
            if not piece:
                return None
            self._inbox.add(piece)
        return message

    def close(self) -> None:
        """End the conversation."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

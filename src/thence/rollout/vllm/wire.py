"""What both sides of the vLLM engine share: messages over a socket, and the digest of weights.

Messages are four bytes of length (big-endian), then JSON in ASCII. `child.py` loads this file where thence is not
installed, so it needs the standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import select
import socket
import struct
import time
from pathlib import Path
from typing import Any

PROTOCOL = 2
TOKEN_VARIABLE = "THENCE_VLLM_TOKEN"
LARGEST = 1 << 30  # bytes of a message; a longer one is something else than a message
_LENGTH = struct.Struct(">I")


class Wire:
    """Messages over a socket. One thread may send while another receives."""

    def __init__(self, sock: socket.socket):
        self._sock, self._bytes = sock, bytearray()

    def send(self, message: dict[str, Any], seconds: float | None = None) -> None:
        """Send a message.

        Raises:
            OSError: the connection broke (TimeoutError where the other side takes longer to read it).
            ValueError: it is longer than a message may be.
        """
        body = json.dumps(message).encode("ascii")
        if len(body) > LARGEST:
            raise ValueError(f"a message of {len(body):,} bytes, at most {LARGEST:,} can be sent")
        self._sock.settimeout(seconds)
        self._sock.sendall(_LENGTH.pack(len(body)) + body)

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
        while (message := self._next(largest)) is None:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            piece = self._sock.recv(1 << 20)
            if not piece:
                return None
            self._bytes += piece
        return message

    def _next(self, largest: int) -> dict[str, Any] | None:
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
            raise ValueError(f"a message that is not a table: {str(message)[:40]}")
        return message

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def weights_digest(folder: str | Path) -> str:
    """16 hex digits of the sha256 over the names and bytes of a folder's safetensors files."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def weight_files(folder: str | Path) -> list[Path]:
    """A folder's safetensors files in order. Raises FileNotFoundError when there are none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors file in {folder}")
    return files

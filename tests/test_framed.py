"""Messages between processes: whole however they are cut, refused where they are none, the standard library alone."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import thence.framed
from thence.framed import Inbox, Wire, pack, read

FILE = Path(thence.framed.__file__)


def test_messages_come_out_whole_however_they_are_cut() -> None:
    sent = [{"text": "ünï\ud800"}, {"n": 1.5}, {}]
    content = b"".join(map(pack, sent))
    for size in (1, 3, len(content)):
        inbox = Inbox()
        pieces = [content[at : at + size] for at in range(0, len(content), size)]
        assert [message for piece in pieces for message in inbox.feed(piece)] == sent
    pipe = io.BytesIO(content)
    assert [read(pipe), read(pipe), read(pipe), read(pipe)] == [*sent, None]
    assert read(io.BytesIO(content[:7])) is None


@pytest.mark.parametrize("content", [b"HTTP/1.1 200 OK", b"\0\0\0\3[1]", b"\0\0\0\2{]", b"\0\1\0\0" + b"[" * 65536])
def test_what_is_no_message_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        Inbox().feed(content)


def test_the_file_needs_the_standard_library_only() -> None:
    code = f"import runpy; found = runpy.run_path({str(FILE)!r}); print(found['pack']({{'a': 1}}))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(pack({"a": 1})), done.stderr


def test_messages_survive_any_cutting_and_a_pause_in_the_middle() -> None:
    left, right = socket.socketpair()
    with left, right:
        wire = Wire(right)
        recorder, reader = socket.socketpair()
        Wire(recorder).send({"text": "ünï\ud800"})
        Wire(recorder).send({"next": 1})
        data = reader.recv(1000)
        left.sendall(data[:7])
        with pytest.raises(TimeoutError):
            wire.receive(0.01)
        left.sendall(data[7:])
        assert wire.receive(1) == {"text": "ünï\ud800"}
        assert wire.receive(1) == {"next": 1}
        left.close()
        assert wire.receive(1) is None
        recorder.close()
        reader.close()

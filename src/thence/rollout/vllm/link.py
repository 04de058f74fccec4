"""The conversation with the process that runs vLLM: starting or reaching it, messages with time limits, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thence.errors import UserError
from thence.foreign_text import one_line
from thence.framed import Wire
from thence.rollout.vllm.failures import failure
from thence.rollout.vllm.replies import checked_ready
from thence.rollout.vllm.settings import CHILD, VllmSettings, shared_token
from thence.rollout.vllm.wire import PROTOCOL, TOKEN_VARIABLE

STOP_SECONDS = 5.0
CONNECT_SECONDS = 10.0
SEND_SECONDS = 120.0
LARGEST_REPLY = 64 * 2**20  # bytes; a response of a million tokens has 30 MB, and other servers' greetings look longer


class Link:
    """One conversation. Any failure ends it: `close` is called, and a UserError raised."""

    def __init__(self, wire: Wire, popen: subprocess.Popen[bytes] | None, log: Path | None, server: str):
        self._wire: Wire | None = wire
        self._popen, self._log, self._server = popen, log, server

    @property
    def open(self) -> bool:
        """Whether something can still be asked."""
        return self._wire is not None

    @property
    def name(self) -> str:
        """What is at the other end, for messages."""
        return f"the vLLM server at {self._server}" if self._server else "vLLM"

    @property
    def pid(self) -> int | None:
        """Of the process that this one has started."""
        return None if self._popen is None else self._popen.pid

    def ask(self, message: dict[str, Any], seconds: float) -> None:
        """Send a request. Raises UserError."""
        wire = self._opened()
        try:
            wire.send(message, seconds)
        except TimeoutError:
            raise self.failed(f"{self.name} did not read a request within {seconds:g} s") from None
        except OSError:
            raise self.failed(f"{self.name} ended unexpectedly", ended=True) from None
        except ValueError as error:
            raise self.failed(f"{self.name} cannot be asked", str(error)) from None

    def answer(self, seconds: float, doing: str) -> dict[str, Any]:
        """The next message. Raises UserError: too late, none any more, no message, or one that says it failed."""
        wire = self._opened()
        try:
            message = wire.receive(seconds, LARGEST_REPLY)
        except TimeoutError:
            raise self.failed(f"{self.name} said nothing for {seconds:g} s while {doing}") from None
        except ValueError as error:
            raise self.not_understood(error) from None
        except OSError:
            message = None
        if message is None:
            raise self.failed(f"{self.name} ended unexpectedly while {doing}", ended=True)
        if "failed" in message:
            raise self.failed(f"{self.name} failed while {doing}", str(message["failed"]))
        return message

    def not_understood(self, error: ValueError) -> UserError:
        """End the conversation; the error to raise about a malformed message."""
        return self.failed(f"{self.name} does not speak thence's protocol ({one_line(str(error), 200)})")

    def failed(self, problem: str, detail: str = "", ended: bool = False) -> UserError:
        """End the conversation; the error to raise. `ended`: the other side has, and its exit code is worth a wait."""
        code = None
        if self._popen is not None and ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._popen.wait(STOP_SECONDS)
        error = failure(problem, log=self._log, detail=detail, code=code)
        self.close()
        return error

    def close(self) -> None:
        """Let a process that was started here end, or end it; leave a server alone. May be called twice."""
        wire, self._wire = self._wire, None
        if wire is not None:
            with contextlib.suppress(OSError):
                wire.send({"op": "stop"}, 1.0)
            wire.close()
        popen, self._popen = self._popen, None
        if popen is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            popen.wait(STOP_SECONDS)
        # It leads its own process group, so that vLLM's children end with it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(popen.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for a disk cannot be killed
            popen.wait(STOP_SECONDS)

    def _opened(self) -> Wire:
        if self._wire is None:
            raise UserError(
                f"{self.name} has been closed after an error or at the end", remedy="make a new engine; run again"
            )
        return self._wire


@dataclass(frozen=True)
class Door:
    """Where other ranks of a run reach a vLLM that one of them has started.

    Args:
        path: of a socket in a folder of this user alone.
        token: what the process asks of them.
    """

    path: str
    token: str


def start(settings: VllmSettings, model: Path, scratch: Sequence[Path], log: Path, door: Door | None = None) -> Link:
    """Start `child.py` in vLLM's environment, with a door for other ranks if one is given. Raises UserError."""
    ours, theirs = socket.socketpair()
    arguments = [*settings.arguments(model), "--fd", str(theirs.fileno())]
    arguments += [f"--scratch={folder}" for folder in scratch]
    variables = settings.variables()
    if door is not None:
        arguments += ["--socket", door.path]
        variables |= {TOKEN_VARIABLE: door.token}
    try:
        with theirs, log.open("ab") as output:
            popen = subprocess.Popen(
                [settings.interpreter(), str(CHILD), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=variables,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
    except OSError as error:
        ours.close()
        raise UserError(
            f"vLLM cannot be started: {error}", remedy="look at vllm.python and vllm.log", field="vllm.python"
        ) from error
    except UserError:
        ours.close()
        raise
    return Link(Wire(ours), popen, log, "")


def connect(settings: VllmSettings) -> Link:
    """Reach a server that the user has started. Raises UserError."""
    host, port = settings.address()
    deadline = time.monotonic() + CONNECT_SECONDS
    shared_token()
    try:
        sock = socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic()))
    except OSError as error:
        raise UserError(
            f"no vLLM server answers at {settings.server}: {error.strerror or error}",
            remedy=f"start one with vLLM's Python: {TOKEN_VARIABLE}=... python {CHILD} --port {port} --model FOLDER",
            field="vllm.server",
        ) from error
    return Link(Wire(sock), None, None, settings.server)


def enter(door: Door) -> Link:
    """Reach a vLLM that another rank of this machine has started. Raises UserError."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(CONNECT_SECONDS)
        sock.connect(door.path)
    except OSError as error:
        sock.close()
        raise UserError(
            f"the vLLM that another rank has started cannot be reached: {error.strerror or error}",
            remedy="look at what that rank printed; or set vllm.ranks_per_engine = 1",
            field="vllm.ranks_per_engine",
        ) from error
    return Link(Wire(sock), None, None, "")


def greet(
    link: Link, token: str, settings: VllmSettings, model: Path | None, run: str | None = None
) -> tuple[dict[str, Any], str | None]:
    """Wait until vLLM is ready: what it says about itself, and the digest of its weights if they are the model's.

    Args:
        run: what the ranks of one run have in common; they are served side by side. None: no other client.

    Raises:
        UserError: it does not start, wants another token, or has another dtype or model than asked for.
    """
    link.ask({"op": "hello", "token": token, "run": run}, SEND_SECONDS)
    about = link.answer(settings.start_seconds, "starting").get("ready")
    if not isinstance(about, dict) or about.get("protocol") != PROTOCOL:
        raise link.failed(f"{link.name} is not of this version of thence")
    try:
        about = checked_ready(about)
    except ValueError as error:
        raise link.not_understood(error) from None
    if about["dtype"] != settings.dtype:
        problem = f"{link.name} computes in {about['dtype']}, asked for was {settings.dtype}"
        raise UserError(problem, remedy="set vllm.dtype or restart the server", field="vllm.dtype")
    if model is not None and about["model"] != str(model.resolve()):
        problem = f"{link.name} has the model {about['model']}, asked for was {model}"
        raise UserError(problem, remedy="start a server with this model", field="vllm.server")
    # Weights that somebody else has pushed have another version, and are refused when sampling begins.
    return about, about["stamp"][1] if model is not None and about["stamp"][0] == 0 else None

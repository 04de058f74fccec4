"""A process that samples with a copy of the trainer's weights, while the trainer takes optimizer steps.

It samples with the same function as the trainer's own process would (:func:`thence.rollout.native.sample`), so that the
same weights, prompts and seeds give the same tokens. Weights go over one tensor at a time, as safetensors files in
shared memory where there is any; both sides call them by a version, which every response is stamped with.

The process is :mod:`thence.pipeline.sampling_process`. Messages are framed as in :mod:`thence.framed`:

    start   model, device, scratch            -> ready
    load    version, folder                   -> loaded: version
    sample  id, version, prompts, of, seeds, sampling
                                              -> done, row, token_ids, logps, finish for every row; at last end
    stop

``alive`` comes now and then while it works. A reply {"failed": text, "remedy": text} ends the conversation.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import thence
from thence.errors import UserError
from thence.foreign_text import one_line
from thence.framed import Wire
from thence.redaction import redacted
from thence.rollout.native import Response, Sampling
from thence.rollout.vllm.weights import folder_for, scratch_folders

MODULE = "thence.pipeline.sampling_process"
START_SECONDS = 600.0  # a large model is made
SEND_SECONDS = 120.0
ALIVE_SECONDS = 2.0
SILENCE_SECONDS = 120.0  # a process that is not stopped says more often that it is alive
STOP_SECONDS = 5.0
AGAIN = "run the same command again: the run resumes from its last checkpoint"


@dataclass(frozen=True)
class HandedWeights:
    """Weights as they stood, for the process to load.

    Args:
        version: what the trainer calls them.
        folder: of their files.
    """

    version: int
    folder: Path


class SamplingChild:
    """The process. A context manager; one thread may ask for responses while another copies weights.

    Args:
        weights: gives all parameters and buffers as they stand, whole, by the names of the model; all ranks call it.
        size: of them, bytes.
        model: what it makes the model from, see :func:`thence.pipeline.sampling_process.made`.
        device: that it samples on.
        threads: of its own; None: as torch chooses.

    Raises:
        UserError: it does not start, or cannot make the model.
    """

    def __init__(
        self,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        size: int,
        model: Mapping[str, Any],
        device: str,
        threads: int | None,
    ):
        self._weights = weights
        self._scratch = scratch_folders("thence-sampling-")
        self._removed = weakref.finalize(self, _remove, self._scratch)
        self._size, self._asked, self.version = size, 0, -1
        self._wire: Wire | None = None
        self._popen: subprocess.Popen[bytes] | None = None
        self._log = self._scratch[-1] / "sampling.log"
        self._closing = threading.Lock()
        try:
            self._start(threads)
            self._ask({"op": "start", "model": model, "device": device, "scratch": list(map(str, self._scratch))})
            self._answer("ready", "making the model", START_SECONDS)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SamplingChild:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Of the process; None once it has ended."""
        return None if self._popen is None else self._popen.pid

    def prepare(self, version: int) -> HandedWeights:
        """Copy the weights as they stand. The process continues with what it does. All ranks call it.

        Raises:
            UserError: there is no room for them.
        """
        folder = folder_for(self._size, self._scratch)
        try:
            for number, (name, value) in enumerate(self._weights()):
                save_file({name: value.detach().cpu().contiguous()}, folder / f"{number:06d}.safetensors")
        except (OSError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(
                f"the weights cannot be handed to the process that samples: {error}",
                remedy="make room there, or set TMPDIR to a folder with room",
                file=folder,
            ) from error
        return HandedWeights(version, folder)

    def take(self, handed: HandedWeights) -> None:
        """Let the process load weights that were prepared; their copy is removed. Raises UserError as :meth:`sample`"""
        try:
            self._ask({"op": "load", "version": handed.version, "folder": str(handed.folder)})
            loaded = self._answer("loaded", "taking weights")
        finally:
            shutil.rmtree(handed.folder, ignore_errors=True)
        if loaded != handed.version:
            raise self._failed(f"says it has weights {loaded}, not {handed.version}")
        self.version = handed.version

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Response]:
        """As :func:`thence.rollout.native.sample`, with the weights that were taken last.

        Raises:
            UserError: the process ended, is stopped, or cannot sample. It is closed then.
        """
        if not prompts:
            return []
        different = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
        place = {prompt: i for i, prompt in enumerate(different)}
        self._asked += 1
        asked = {"op": "sample", "id": self._asked, "version": self.version, "seeds": list(seeds)}
        rows = {"prompts": different, "of": [place[tuple(prompt)] for prompt in prompts]}
        self._ask({**asked, **rows, "sampling": asdict(sampling)})
        found: dict[int, Response] = {}
        while (done := self._answer("done", "sampling")) != "end":
            if done["stamp"] != [self._asked, self.version] or done["row"] in found:
                raise self._failed(f"gave a response to {done['stamp']}, asked was {[self._asked, self.version]}")
            found[done["row"]] = Response(done["token_ids"], done["logps"], done["finish"])
        if found.keys() != set(range(len(prompts))):
            raise self._failed(f"gave {len(found)} of {len(prompts)} responses")
        return [found[i] for i in range(len(prompts))]

    def close(self) -> None:
        """End the process and remove what was written for it. May be called twice, and while another thread asks."""
        with self._closing:
            popen, self._popen = self._popen, None
            if popen is not None:
                if self._wire is not None:
                    with contextlib.suppress(OSError):
                        self._wire.send({"op": "stop"}, 1.0)
                # One that samples does not listen. Its end is what another thread, which waits for it, hears.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    popen.wait(0.5)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(popen.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    popen.wait(STOP_SECONDS)
            if self._wire is not None:
                self._wire.close()
            self._removed()

    def _start(self, threads: int | None) -> None:
        ours, theirs = socket.socketpair()
        self._wire = Wire(ours)
        root = str(Path(thence.__file__).resolve().parent.parent)
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
        own = {"PYTHONPATH": path, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
        with theirs, self._log.open("ab") as output:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **own},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C at the terminal is the trainer's, which then ends it
            )

    def _ask(self, message: dict[str, Any]) -> None:
        if self._popen is None or self._wire is None:
            raise UserError("the process that samples has ended", remedy=AGAIN)
        try:
            self._wire.send(message, SEND_SECONDS)
        except (OSError, ValueError) as error:
            raise self._failed(f"cannot be asked: {error}") from None

    def _answer(self, key: str, doing: str, seconds: float | None = None) -> Any:
        """What the next message says of ``key``; ``end`` where it ends an answer in parts. Raises UserError.

        A process that says now and then that it is alive may take any time; ``seconds`` is the most in any case.
        """
        said = time.monotonic()
        deadline = None if seconds is None else said + seconds
        while True:
            wire = self._wire
            if self._popen is None or wire is None:
                raise UserError(f"the process that samples was ended while {doing}", remedy=AGAIN)
            try:
                message = wire.receive(1.0)
            except TimeoutError:
                if time.monotonic() - said > SILENCE_SECONDS:
                    raise self._failed(f"said nothing for {SILENCE_SECONDS:g} s while {doing}") from None
                if deadline is not None and time.monotonic() > deadline:
                    raise self._failed(f"was not ready after {seconds:g} s of {doing}") from None
                continue
            except (OSError, ValueError):
                message = None
            said = time.monotonic()
            if message is None:
                raise self._failed(f"ended unexpectedly while {doing}", ended=True)
            if "failed" in message:
                raise self._failed(f"failed while {doing}: {message['failed']}", remedy=message.get("remedy"))
            if "end" in message:
                return "end"
            if key in message:
                return message if key == "done" else message[key]

    def _failed(self, problem: str, ended: bool = False, remedy: str | None = None) -> UserError:
        """End the process; the error to raise."""
        how = ""
        if ended and (popen := self._popen) is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = popen.wait(STOP_SECONDS)
                how = f" ({signal.Signals(-code).name})" if code < 0 else f" (exit code {code})"
        tail = "" if remedy else _tail(self._log)
        self.close()
        return UserError(f"the process that samples {problem}{how}{tail}", remedy=remedy or AGAIN)


def _tail(log: Path) -> str:
    """The last line that the process printed, as the end of a sentence; empty: there is none."""
    with contextlib.suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if lines:
            return f"; it said last: {redacted(one_line(lines[-1], 300))}"
    return ""


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)

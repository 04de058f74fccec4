"""The process that samples for a trainer: see :mod:`thence.rollout.child`, which starts it and which it ends with.

python -m thence.pipeline.sampling_process FD
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thence.errors import UserError, first_line
from thence.framed import Wire
from thence.rollout.child import ALIVE_SECONDS, SEND_SECONDS


class Voice:
    """Says things to the trainer from several threads, one message at a time; ends the process once nobody hears."""

    def __init__(self, wire: Wire, scratch: list[Path]):
        self.wire, self.scratch, self._lock = wire, scratch, threading.Lock()

    def say(self, message: dict[str, Any]) -> None:
        try:
            with self._lock:
                self.wire.send(message, SEND_SECONDS)
        except OSError:  # the trainer is gone: what was written for this process is nobody's
            self.leave(1)

    def leave(self, code: int) -> None:
        """Remove what was written for this process, and end it, whatever its threads do."""
        for folder in self.scratch:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(code)


def serve(wire: Wire) -> None:
    """Answer until the trainer says stop, or is gone."""
    start = next_message(wire)
    if start is None:
        return
    voice = Voice(wire, [Path(folder) for folder in start["scratch"]])
    threading.Thread(target=_stay_alive, args=(voice,), daemon=True).start()
    try:
        model = opened(start["model"], start["device"])
        voice.say({"ready": True})
        version = -1
        while (asked := next_message(wire)) is not None and asked["op"] != "stop":
            if asked["op"] == "load":
                load(model, Path(asked["folder"]))
                version = asked["version"]
                voice.say({"loaded": version})
            else:
                answer(voice, model, version, asked)
    except UserError as error:
        voice.say({"failed": error.problem, "remedy": error.remedy})
    except Exception as error:
        traceback.print_exc()
        voice.say({"failed": f"{type(error).__name__}: {first_line(error)}"})
    voice.leave(0)


def next_message(wire: Wire) -> dict[str, Any] | None:
    """The trainer's next message; None where it is gone."""
    while True:
        try:
            return wire.receive(3600.0)
        except TimeoutError:
            continue
        except OSError:
            return None


def opened(settings: dict[str, Any], device: str) -> Any:
    """The trainer's model, with the weights that it was written with. Raises RecipeError."""
    import torch

    from thence.recipe import Model
    from thence.train.model import load_model

    return load_model(Model(**settings), torch.device(device)).model.requires_grad_(False)


def load(model: Any, folder: Path) -> None:
    """Copy weights into the model, one tensor at a time.

    Raises:
        UserError: a weight of the model is not among them, or one of them is none of the model's.
    """
    import torch
    from safetensors.torch import load_file

    own = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    left = {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for file in sorted(folder.glob("*.safetensors")):
            for name, value in load_file(file).items():
                if name not in own or own[name].shape != value.shape or own[name].dtype != value.dtype:
                    raise _misfit(f"{name} of shape {tuple(value.shape)} and type {value.dtype} is none of its own")
                own[name].copy_(value)
                left.discard(name)
    if left:
        raise _misfit(f"{min(left)} was not handed over")


def _misfit(why: str) -> UserError:
    return UserError(
        f"the trainer's weights do not fit the model as it was written and opened again: {why}",
        remedy='set ahead = 0, or sample with engine = "vllm"',
    )


def answer(voice: Voice, model: Any, version: int, asked: dict[str, Any]) -> None:
    """Sample what is asked for; say every response as soon as it ends.

    Raises:
        UserError: other weights are asked for than were loaded, or the model cannot be sampled from.
    """
    from thence.rollout.native import Sampling, stream

    if asked["version"] != version:
        raise UserError(
            f"weights of version {asked['version']} are asked for, and it has version {version}",
            remedy="run the same command again",
        )
    sampling = Sampling(**{**asked["sampling"], "stop_ids": tuple(asked["sampling"]["stop_ids"])})
    prompts = [asked["prompts"][i] for i in asked["of"]]
    stamp = [asked["id"], version]
    for row, response in stream(model, prompts, asked["seeds"], sampling):
        said = {"token_ids": response.token_ids, "logps": response.logps, "finish": response.finish}
        voice.say({"done": True, "stamp": stamp, "row": row, **said})
    voice.say({"end": asked["id"]})


def _stay_alive(voice: Voice) -> None:
    count = 0
    while not threading.Event().wait(ALIVE_SECONDS):
        voice.say({"alive": (count := count + 1)})


def main(arguments: Sequence[str]) -> None:
    """The command: the number of the socket to the trainer."""
    serve(Wire(socket.socket(fileno=int(arguments[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
